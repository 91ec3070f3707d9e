"""Each rule of the sources finds a breach that is planted in a tiny tree, and finds none where there is none."""

from __future__ import annotations

import pytest
from source_rules import (
    argument_breaches,
    circle_breaches,
    floor_breaches,
    folder_breaches,
    length_breaches,
    private_breaches,
    public_names,
    room_breaches,
    twice_defined_breaches,
)

FLOORS = (("ground",), ("app.low",), ("app.high",), ("app.__init__",))


class TestFloors:
    def test_an_import_that_goes_up(self) -> None:
        tree = {
            "app/low/a.py": "import os\nfrom app.high import b\n", "app/high/b.py": "from ..low.a import x\n",
            "kernels/ground/c.py": "from app.low.a import x\n", "app/__init__.py": "from .high import b\n",
        }  # fmt: skip
        assert sorted(map(str, floor_breaches(tree, FLOORS))) == [
            "app/low/a.py:2: imports app.high.b from a floor above",
            "kernels/ground/c.py:1: imports app.low.a from a floor above",
        ]

    def test_the_face_is_above_its_floors(self) -> None:
        tree = {"app/__init__.py": "from .low import a\n", "app/low/a.py": "def f():\n    from app import b\n"}
        assert [str(breach) for breach in floor_breaches(tree, FLOORS)] == [
            "app/low/a.py:2: imports app from a floor above"
        ]

    def test_a_module_on_no_floor(self) -> None:
        assert [str(breach) for breach in floor_breaches({"app/new.py": ""}, FLOORS)] == [
            "app/new.py:1: app.new is on no floor"
        ]


class TestRooms:
    ROOMS = {"app": (("config", "parts"), ("attach",))}  # noqa: RUF012

    def test_an_import_from_a_room_above(self) -> None:
        tree = {
            "app/__init__.py": "from .attach.a import x\n", "app/config.py": "from .parts.p import x\n",
            "app/parts/p.py": "\nfrom ..attach.a import x\n", "app/attach/a.py": "from ..config import x\n",
        }  # fmt: skip
        assert [str(breach) for breach in room_breaches(tree, self.ROOMS)] == [
            "app/parts/p.py:2: imports app.attach.a from a room above"
        ]

    def test_an_import_from_the_package_itself(self) -> None:
        tree = {"app/__init__.py": "", "app/parts/p.py": "from app import x\n", "app/beside.py": "from . import x\n"}
        assert [str(breach) for breach in room_breaches(tree, self.ROOMS)] == [
            "app/parts/p.py:1: imports x from app, not from its file"
        ]


class TestCircles:
    TREE = {  # noqa: RUF012
        "app/a.py": "import app.b\n", "app/b.py": "def f():\n    from . import c\n",
        "app/c.py": "if TYPE_CHECKING:\n    from .a import A\n", "app/d.py": "from .a import A\n",
    }  # fmt: skip

    def test_a_circle_through_a_function_and_for_the_type_checker(self) -> None:
        assert [str(breach) for breach in circle_breaches(self.TREE, {})] == [
            "app/a.py:1: imports in a circle: app.b -> app.c -> app.a"
        ]

    def test_a_late_import_with_a_reason(self) -> None:
        assert not list(circle_breaches(self.TREE, {("app.b", "app.c"): "c is needed only to draw"}))

    def test_a_reason_does_not_excuse_an_early_import(self) -> None:
        assert list(circle_breaches(self.TREE, {("app.a", "app.b"): "no function, no excuse"}))


class TestPrivateNames:
    def test_an_import_of_a_private_name(self) -> None:
        tree = {"app/a.py": "_x = __version__ = 1\n", "app/b.py": "from app.a import __version__, _x\n"}
        assert [str(breach) for breach in private_breaches(tree)] == [
            "app/b.py:1: imports the private name _x of app.a"
        ]

    def test_a_private_module(self) -> None:
        tree = {"app/_a.py": "", "app/b.py": "from app import _a\n"}
        assert [str(breach) for breach in private_breaches(tree)] == [
            "app/b.py:1: imports the private name _a of app._a"
        ]

    def test_a_private_attribute_of_a_module(self) -> None:
        tree = {
            "app/a.py": "",
            "app/b.py": "import torch\nfrom app import a as other\n\nother._x()\ntorch._dynamo\nself._x\n",
        }
        assert [str(breach) for breach in private_breaches(tree)] == ["app/b.py:4: uses the private name _x of app.a"]


class TestPublicNames:
    def test_they_are_those_listed(self) -> None:
        assert public_names("from .a import x, y\n\n__all__ = ['x', 'y']\n") == ["x", "y"]

    def test_there_has_to_be_a_list(self) -> None:
        with pytest.raises(ValueError, match="no __all__"):
            public_names("x = 1\n")


class TestSizes:
    def test_a_long_file(self) -> None:
        tree = {"a.cpp": "\n" * 4, "b.py": "\n" * 3}
        assert [str(breach) for breach in length_breaches(tree, 3)] == ["a.cpp:4: is longer than 3 lines"]

    def test_a_full_folder(self) -> None:
        tree = dict.fromkeys(["x/__init__.py", "x/a.py", "x/b.py", "x/c.h", "x/y/d.py", "z/__init__.py", "z/a.py"], "")
        assert [str(breach) for breach in folder_breaches(tree, 2)] == ["x:1: has more than 2 files"]


class TestArguments:
    def test_too_many_by_position(self) -> None:
        tree = {
            "a.py": "def f(a, b, /, c): ...\ndef g(a, b, *, c, d): ...\n"
            "class A:\n    def m(self, a, b): ...\n    async def n(self, a, b, c): ...\n"
            "    @staticmethod\n    def s(a, b, c): ...\n    @classmethod\n    def c(cls, a, b): ...\n"
        }
        assert [str(breach) for breach in argument_breaches(tree, 2, "operation")] == [
            "a.py:1: f takes more than 2 positional arguments",
            "a.py:5: n takes more than 2 positional arguments",
            "a.py:7: s takes more than 2 positional arguments",
        ]

    def test_what_is_registered_has_the_schema_of_its_operation(self) -> None:
        tree = {
            "a.py": "@ops.operation('f', fake)\ndef f(a, b, c): ...\ndef fake(a, b, c): ...\n"
            "def save(a, b, c): ...\nregister('f', setup=save)\ndef other(a, b, c): ...\nprint(other)\n"
        }
        assert [str(breach) for breach in argument_breaches(tree, 2, "operation|register")] == [
            "a.py:6: other takes more than 2 positional arguments"
        ]


class TestNamesWithTwoMeanings:
    TREE = {"app/a.py": "class Rows: ...\nclass _Case: ...\n", "app/b.py": "class _Case: ...\n\nclass Rows: ...\n"}  # noqa: RUF012

    def test_a_class_that_is_defined_twice(self) -> None:
        assert [str(breach) for breach in twice_defined_breaches(self.TREE, {})] == [
            "app/b.py:3: class Rows is in app/a.py too"
        ]

    def test_one_with_a_reason(self) -> None:
        assert not list(twice_defined_breaches(self.TREE, {"Rows": "of a table, and of a matrix"}))
