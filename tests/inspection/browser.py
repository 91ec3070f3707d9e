"""A page in headless Chromium: steps in JavaScript run in it, what they return comes back, with the console's lines.

No driver is needed: the steps become a script at the page's end, and the browser prints the document after it ran.
"""

import html
import json
import re
import shutil
import subprocess

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_WATCH = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push(event.message));
addEventListener("securitypolicyviolation", (event) => problems.push(event.violatedDirective));
for (const kind of ["error", "warn"]) console[kind] = (...words) => problems.push(words.join(" "));
</script>"""
_RUN = """<script>
(async () => {
  const frame = () => new Promise((done) => setTimeout(done, 20));
  let result = null;
  try { result = await (async () => { %s })(); } catch (error) { problems.push(String(error)); }
  document.body.dataset.outcome = JSON.stringify({ result, problems });
})();
</script></body>"""


def in_browser(page, steps, folder):
    """Run steps (the body of an async JavaScript function) in the page; return (what they return, problems)."""
    file = folder / "page.html"
    file.write_text(page.replace("<head>", f"<head>{_WATCH}", 1).replace("</body>", _RUN % steps), encoding="utf-8")
    run = browser("--virtual-time-budget=10000", "--dump-dom", f"--user-data-dir={folder / 'profile'}", file.as_uri())
    (outcome,) = re.findall(r'data-outcome="([^"]*)"', run.stdout)
    found = json.loads(html.unescape(outcome))
    logged = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    return found["result"], found["problems"] + logged


def browser(*arguments):
    """Run the browser to its end."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
