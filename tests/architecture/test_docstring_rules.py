"""Each rule of docstrings finds a breach that is planted in a tiny tree, and finds none where there is none."""

from __future__ import annotations

import pytest
from docstring_rules import DTYPE, SHAPE, missing_breaches, shape_breaches


def missing(text: str) -> list[str]:
    return [str(breach) for breach in missing_breaches({"app/a.py": f'"""What lives here."""\n{text}'})]


def shapes(text: str, dtypes: tuple[str, ...] = ()) -> list[str]:
    return [str(breach) for breach in shape_breaches({"app/a.py": text}, dtypes, ("app/definitions/",))]


class TestMissing:
    def test_of_a_module(self) -> None:
        assert [str(breach) for breach in missing_breaches({"app/a.py": "x = 1\n"})] == [
            "app/a.py:1: the module has no docstring"
        ]

    def test_of_a_function_a_class_and_a_method(self) -> None:
        text = "def f(): ...\nclass A:\n    def m(self): ...\n    @property\n    def p(self): ...\n"
        assert missing(text) == [
            "app/a.py:2: f has no docstring", "app/a.py:3: A has no docstring", "app/a.py:4: A.m has no docstring",
            "app/a.py:6: A.p has no docstring",
        ]  # fmt: skip

    def test_what_is_private_or_within_a_function_needs_none(self) -> None:
        assert not missing(
            'def _f(): ...\nclass _A:\n    def m(self): ...\ndef g():\n    """Do."""\n    def inner(): ...\n'
            'class B:\n    """Is."""\n    def __init__(self): ...\n    @p.setter\n    def p(self, x): ...\n'
        )

    def test_what_torch_or_a_base_class_documents_needs_none(self) -> None:
        base = 'class Base:\n    """Is."""\n    def merge(self):\n        """Merge."""\n    def forward(self, x): ...\n'
        below = 'class Middle(Base):\n    """Is."""\nclass Low(a.Middle[int]):\n    """Is."""\n'
        assert not missing(f"{base}{below}    def merge(self): ...\n")
        assert missing(f"{base}{below}    def other(self): ...\n") == ["app/a.py:11: Low.other has no docstring"]


class TestShapes:
    @pytest.mark.parametrize(
        "text",
        [
            "x (tokens, r)",
            "of (tokens,)",
            "(..., in_features)",
            "(2·r, out/2)",
            "()",
            "any shape",
            "a scalar",
            "shapes:",
        ],
    )
    def test_what_states_a_shape(self, text: str) -> None:
        assert SHAPE.search(text)

    @pytest.mark.parametrize(
        "text", ["x", "Return the weight (see there)", "(Hu et al., 2021)", "(tokens r)", "f(x, y)", "f()"]
    )
    def test_what_states_none(self, text: str) -> None:
        assert not SHAPE.search(text)

    def test_a_function_with_tensors_states_one(self) -> None:
        assert shapes('def f(x: Tensor):\n    """Do."""\ndef g(x: int) -> list[Tensor]:\n    """Do (n, r)."""\n') == [
            "app/a.py:1: f states no shape"
        ]
        assert shapes('def f(*, x: "Tensor | None"):\n    """Do."""\n') == ["app/a.py:1: f states no shape"]
        assert not shapes('def f(x: int):\n    """Do."""\ndef _g(x: Tensor): ...\n')

    def test_a_method_is_documented_by_its_class_or_by_what_it_overrides(self) -> None:
        assert not shapes('class A:\n    """Takes (tokens, r)."""\n    def forward(self, x: Tensor): ...\n')
        text = 'class A:\n    """Is."""\n    def m(self, x: Tensor):\n        """Take {}."""\n'
        text += 'class B(A):\n    """Is."""\n    def m(self, x: Tensor): ...\n'
        assert not shapes(text.format("(tokens, r)"))
        assert shapes(text.format("it")) == ["app/a.py:3: A.m states no shape", "app/a.py:7: B.m states no shape"]

    def test_a_backend_is_documented_by_the_definition(self) -> None:
        definition = {"app/definitions/op.py": 'def op(x: Tensor):\n    """Compute (n,)."""\n'}
        backends = dict.fromkeys(("app/cpu.py", "other/cpu.py"), "def op(x: Tensor): ...\n")
        assert [str(breach) for breach in shape_breaches(definition | backends, (), ("app/definitions/",))] == [
            "other/cpu.py:1: op states no shape"
        ]

    def test_where_bytes_matter_a_dtype_is_stated(self) -> None:
        text = 'def f(x: Tensor):\n    """Take (n,){}."""\n'
        assert not shapes(text.format(""))
        assert shapes(text.format(""), ("app/",)) == ["app/a.py:1: f states no dtype"]
        assert not shapes(text.format(" in fp32"), ("app/",)) and DTYPE.search("uint8")
