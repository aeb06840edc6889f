"""The import hook, on modules made for the purpose: when a patch runs, and what it leaves alone."""

import importlib
import inspect
import subprocess
import sys
import textwrap
import time

import pytest

import nni_plugins
from nni_plugins.compat import Patch, patches
from nni_plugins.compat.hook import PatchFinder


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a defect: `answer()` is 41."""
    folder = tmp_path / "defective_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "part.py").write_text("def answer():\n    return 41\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "defective_package.part"
    for name in [name for name in sys.modules if name.startswith("defective_package")]:
        del sys.modules[name]


@pytest.fixture
def install(monkeypatch):
    """Put a finder for some patches in front, and take it out again."""

    def put(*these):
        finder = PatchFinder(these)
        monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
        return finder

    return put


def mending(module, **changes):
    def mend(part):
        part.answer = lambda: 42

    arguments = {"defect": lambda part: part.answer() != 42, "mend": mend, **changes}
    return Patch("answer", module, "the answer is wrong", **arguments)


def test_applied_when_its_module_is_imported(package, install):
    patch = mending(package)
    install(patch)
    assert patch.state == "waiting"
    importlib.import_module("defective_package")
    assert patch.state == "waiting"
    assert importlib.import_module(package).answer() == 42
    assert patch.state == "applied"


def test_nothing_is_left_of_the_hook_in_the_module(package, install):
    install(mending(package))
    part = importlib.import_module(package)
    assert type(part.__loader__).__name__ == type(part.__spec__.loader).__name__ == "SourceFileLoader"
    assert "return 41" in inspect.getsource(part)
    assert importlib.reload(part).answer() == 42


def test_sound_module_is_left_alone(package, install):
    patch = mending(package, defect=lambda part: False)
    install(patch)
    assert importlib.import_module(package).answer() == 41
    assert patch.state == "not needed"


def test_module_that_was_there_before_is_patched_once(package, install):
    part = importlib.import_module(package)
    patch = mending(package)
    finder = install(patch)
    finder.patch_imported()
    mended = part.answer
    finder.patch_imported()
    assert (part.answer(), part.answer, patch.state) == (42, mended, "applied")


def test_failing_patch_never_breaks_the_import(package, install):
    def fail(part):
        raise KeyError("gone")

    patch = mending(package, mend=fail)
    install(patch)
    with pytest.warns(RuntimeWarning, match=r"patch answer of defective_package\.part failed \(KeyError: 'gone'\)"):
        assert importlib.import_module(package).answer() == 41
    assert (patch.state, patch.detail) == ("failed", "KeyError: 'gone'")


def test_prepare_runs_around_the_execution(package, install):
    events = []

    def prepare(part):
        events.append(hasattr(part, "answer"))
        return lambda: events.append(hasattr(part, "answer"))

    patch = mending(package, prepare=prepare)
    install(patch)
    importlib.import_module(package)
    assert (events, patch.state) == ([False, True], "applied")


@pytest.fixture
def framework(package, tmp_path):
    """A second module, in which the defect of the first can be seen."""
    (tmp_path / "defective_package" / "framework.py").write_text("right = 42\n")
    return "defective_package.framework"


def framed(package, framework):
    return mending(
        package, framework=framework, defect=lambda part: part.answer() != importlib.import_module(framework).right
    )


def test_defect_in_a_framework_waits_until_it_is_imported(package, framework, install):
    patch = framed(package, framework)
    finder = install(patch)
    part = importlib.import_module(package)
    finder.patch_imported()
    assert (part.answer(), patch.state, patch.detail) == (41, "waiting", "it is looked at when that is imported")
    assert framework not in sys.modules
    importlib.import_module(framework)
    assert (part.answer(), patch.state, patch.detail) == (42, "applied", "")


def test_framework_that_was_there_first(package, framework, install):
    importlib.import_module(framework)
    patch = framed(package, framework)
    install(patch)
    assert importlib.import_module(package).answer() == 42
    assert patch.state == "applied"


def test_framework_that_its_module_imports(package, framework, install, tmp_path):
    source = "from defective_package import framework\ndef answer():\n    return 41\n"
    (tmp_path / "defective_package" / "part.py").write_text(source)
    patch = framed(package, framework)
    install(patch)
    assert importlib.import_module(package).answer() == 42
    assert patch.state == "applied"


def test_framework_without_the_defect(package, framework, install, tmp_path):
    (tmp_path / "defective_package" / "framework.py").write_text("right = 41\n")
    patch = framed(package, framework)
    install(patch)
    part = importlib.import_module(package)
    importlib.import_module(framework)
    assert (part.answer(), patch.state) == (41, "not needed")


def test_framework_that_is_not_installed(package, install):
    patch = framed(package, "absent_framework.trainer")
    install(patch)
    assert importlib.import_module(package).answer() == 41
    assert (patch.state, patch.detail) == ("not needed", "absent_framework is not installed")


def test_missing_module_is_still_missing(install):
    install(mending("defective_package.nowhere"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("defective_package.nowhere")


@pytest.mark.alone
def test_importing_us_is_cheap():
    code = """
        import sys, time
        start = time.process_time()
        import nni_plugins
        spent = time.process_time() - start
        print(spent, *[name for name in ("torch", "nni", "numpy", "scipy") if name in sys.modules])
    """
    runs = [subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True) for _ in "12"]
    seconds = [run.stdout.split() for run in runs]
    assert all(len(line) == 1 for line in seconds), seconds
    assert min(float(line[0]) for line in seconds) < 0.25


def test_arm_twice_installs_one_finder():
    nni_plugins.arm()
    nni_plugins.arm()
    assert sum(isinstance(finder, PatchFinder) for finder in sys.meta_path) == 1


def test_patches_are_named_and_explained():
    names = [patch.name for patch in patches()]
    assert len(set(names)) == len(names)
    assert all(patch.mends and "\n" not in patch.mends and patch.module for patch in patches())


@pytest.mark.alone
def test_look_up_of_other_modules_costs_nothing():
    finder = PatchFinder(patches())
    start = time.process_time()
    for _ in range(1000):
        assert finder.find_spec("some.other.module", None) is None
    assert time.process_time() - start < 0.05
