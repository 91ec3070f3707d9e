#!/usr/bin/env bash
# Runs every check of the kernels on this computer's GPU and writes one Markdown file: the machine, the kernels' tests,
# the tuning run, bench.gpu (correctness and speed) and bench.static_gpu. After a failed step, which is also in the
# report, the others still run.
#
# Run as: bench/gpu.sh [REPORT.md] [options of bench.gpu]      (PYTHON=... names another Python than .venv's)
# Without a GPU it exits with status 2. `bench/gpu.sh report.md --device cpu --small` shows what it would write.
set -uo pipefail

report=gpu-report.md
if [[ $# -gt 0 && $1 != -* ]]; then
  report=$1
  shift
fi
report=$(realpath -m "$report")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
[[ -x $python ]] || python=$(command -v "$python" || command -v python3) || { echo "gpu.sh: no Python found" >&2; exit 2; }
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"

if ! "$python" -c "import torch" 2> /dev/null; then
  echo "gpu.sh: $python has no PyTorch; run 'make setup', or name another: PYTHON=/path/to/python bench/gpu.sh" >&2
  exit 2
fi
if [[ " $* " != *" --device"* ]]; then
  "$python" -c "from bench.gpu.measure import current_gpu; current_gpu()" || exit 2
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failures=0

# section TITLE COMMAND...: adds a command, its output and its status to the report.
section() {
  local title=$1 start=$SECONDS status=0
  shift
  echo "gpu.sh: $title" >&2
  "$@" > "$folder/output" 2>&1 || status=$?
  ((status == 0)) || failures=$((failures + 1))
  {
    printf '## %s\n\n%s: exit status %d, %d s\n\n' "$title" "${*/#"$python"/python}" "$status" $((SECONDS - start))
    printf '~~~text\n'
    cat "$folder/output"
    printf '~~~\n\n'
  } >> "$report"
}

environment() {
  "$python" -c "import torch; from bench.harness.report import machine
device = torch.accelerator.current_accelerator()
print(*(f'{name}: {value}' for name, value in machine(device).items()), sep='\n')"
  git log -1 --format='lorakit: %H' 2> /dev/null
  local tool
  for tool in nvidia-smi rocm-smi xpu-smi; do
    if command -v "$tool" > /dev/null; then "$tool"; fi
  done
  return 0
}

printf '# lorakit on a GPU\n\n' > "$report"
section "Environment" environment
section "Tests of the kernels" "$python" -m pytest tests/kernels
section "Tuning" "$python" -m lorakit_kernels.triton.tune
section "Measurements" "$python" -m bench.gpu --markdown "$folder/table.md" "$@"
[[ ! -e $folder/table.md ]] || { cat "$folder/table.md"; echo; } >> "$report"
section "Compiled code" "$python" -m bench.static_gpu
echo "gpu.sh: wrote $report; steps that failed: $failures" >&2
((failures == 0))
