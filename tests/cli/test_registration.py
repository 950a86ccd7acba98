"""Real wheels in real environments: which commands ``litgpt`` offers, on every way in, before and after."""

import os
import statistics
import subprocess
import sys
import sysconfig
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from litgpt_akl.cli.main import COMMANDS

REPOSITORY = Path(__file__).parents[2]
SITE_PACKAGES = Path("lib", f"python{sys.version_info.major}.{sys.version_info.minor}", "site-packages")
# PYTHONPATH would lend the environments a package that is not installed in them; LitGPT's deprecations are its own
VARIABLES = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
VARIABLES["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the environments are laid out as on Unix")


def run(*command, timeout: int = 120) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)), cwd="/", env=VARIABLES, capture_output=True, text=True, timeout=timeout, check=False
    )


def run_all(commands: dict[str, list]) -> dict[str, subprocess.CompletedProcess]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(commands, pool.map(lambda command: run(*command), commands.values()), strict=True))


def pip(environment: Path, *arguments) -> None:
    offline = ["--no-index", "--no-deps"] if arguments[0] == "install" else []
    python = environment / "bin" / "python"
    completed = run(
        sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, *arguments, *offline
    )
    assert completed.returncode == 0, completed.stderr


def files_of(environment: Path) -> set[str]:
    names = [str(path.relative_to(environment)) for path in environment.rglob("*") if "__pycache__" not in path.parts]
    return {name for name in names if "litgpt" in name}


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory) -> Path:
    """Links to all that is installed here, except this package, and Transformers, which it can do without.

    Where that is installed, LitGPT imports it, which takes half of the time of ``litgpt --help``.
    """
    directory = tmp_path_factory.mktemp("dependencies")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("litgpt_akl", "transformers")) and path.suffix not in (".pth", ".start"):
            (directory / path.name).symlink_to(path)
    return directory


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory, REPOSITORY)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(directory.glob("litgpt_akl-*.whl"))


def make_environment(directory: Path, dependencies: Path) -> Path:
    """An environment that has LitGPT and its command, and not yet this package."""
    venv.create(directory, symlinks=True)
    (directory / SITE_PACKAGES / "dependencies.pth").write_text(f"{dependencies}\n")
    script = directory / "bin" / "litgpt"
    python = directory / "bin" / "python"
    script.write_text(f"#!{python}\nimport sys\nfrom litgpt.__main__ import main\nsys.exit(main())\n")
    script.chmod(0o755)
    return directory


@pytest.fixture(scope="module")
def litgpt_help(tmp_path_factory, dependencies) -> str:
    """``litgpt --help`` where this package never was."""
    environment = make_environment(tmp_path_factory.mktemp("plain") / "env", dependencies)
    completed = run(environment / "bin" / "litgpt", "--help")
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


@pytest.fixture
def environment(tmp_path, dependencies) -> Path:
    return make_environment(tmp_path / "env", dependencies)


def assert_lists_our_commands(text: str, litgpt_help: str) -> None:
    assert [word for word in text.split() if word in COMMANDS] == list(COMMANDS)
    assert listed_commands(text) == [*listed_commands(litgpt_help), *COMMANDS]


def listed_commands(text: str) -> list[str]:
    return next(word for word in text.split() if word.startswith("{download,")).strip("{}").split(",")


def ways_in(environment: Path) -> dict[str, list]:
    scripts = environment / "bin"
    return {
        "litgpt": [scripts / "litgpt"],
        "python -m litgpt": [scripts / "python", "-m", "litgpt"],
        "litgpt-akl": [scripts / "litgpt-akl"],
        "python -m litgpt_akl": [scripts / "python", "-m", "litgpt_akl"],
    }


@pytest.mark.slow
def test_wheel_offers_the_commands_on_every_way_in(environment, wheel, litgpt_help):
    before = files_of(environment)
    pip(environment, "install", wheel)

    ways = ways_in(environment)
    helps = run_all(
        {way: [*command, "--help"] for way, command in ways.items()}
        | {f"{way} finetune_akl": [*command, "finetune_akl", "--help"] for way, command in ways.items()}
    )
    for way in ways:
        assert (helps[way].returncode, helps[way].stderr) == (0, ""), way
        assert_lists_our_commands(helps[way].stdout, litgpt_help)
        command_help = helps[f"{way} finetune_akl"]
        assert (command_help.returncode, command_help.stderr) == (0, ""), way
        assert "--teacher_checkpoint_dir" in command_help.stdout, way

    pip(environment, "uninstall", "--yes", "litgpt-akl")
    assert files_of(environment) == before
    assert run(environment / "bin" / "litgpt", "--help").stdout == litgpt_help


@pytest.mark.slow
def test_launchers_reach_the_commands(environment, wheel):
    pip(environment, "install", wheel)
    torchrun = [environment / "bin" / "python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1]
    helps = run_all(
        {
            "torchrun -m litgpt": [*torchrun, "-m", "litgpt", "finetune_akl", "--help"],
            "torchrun bin/litgpt": [*torchrun, environment / "bin" / "litgpt", "finetune_akl", "--help"],
            "Fabric's child process": [
                environment / "bin" / "python",
                "-m",
                "litgpt.__main__",
                "finetune_akl",
                "--help",
            ],
        }
    )
    for way, completed in helps.items():
        assert completed.returncode == 0, completed.stderr
        assert "--teacher_checkpoint_dir" in completed.stdout, way


@pytest.mark.slow
def test_editable_install_offers_the_commands(environment, litgpt_help):
    before = files_of(environment)
    pip(environment, "install", "--no-build-isolation", "--editable", REPOSITORY)
    assert {"litgpt_akl.pth", "litgpt_akl.start"} <= {path.name for path in (environment / SITE_PACKAGES).iterdir()}
    assert_lists_our_commands(run(environment / "bin" / "litgpt", "--help").stdout, litgpt_help)
    pip(environment, "uninstall", "--yes", "litgpt-akl")
    assert files_of(environment) == before


def test_own_command_needs_no_startup_file(environment, wheel, litgpt_help):
    pip(environment, "install", wheel)
    (environment / SITE_PACKAGES / "litgpt_akl.pth").unlink()
    (environment / SITE_PACKAGES / "litgpt_akl.start").unlink()
    ways = ways_in(environment)
    helps = run_all({way: [*ways[way], "--help"] for way in ("litgpt", "litgpt-akl", "python -m litgpt_akl")})
    assert helps["litgpt"].stdout == litgpt_help
    assert_lists_our_commands(helps["litgpt-akl"].stdout, litgpt_help)
    assert_lists_our_commands(helps["python -m litgpt_akl"].stdout, litgpt_help)


def test_litgpt_works_on_when_this_package_is_broken(environment, wheel, litgpt_help):
    pip(environment, "install", wheel)
    package = environment / SITE_PACKAGES / "litgpt_akl"
    (package / "commands" / "make_student.py").write_text("import a_module_that_is_not_there\n")
    completed = run(environment / "bin" / "litgpt", "--help")
    assert (completed.returncode, completed.stdout) == (0, litgpt_help)
    reason = "The litgpt-akl commands are missing: ModuleNotFoundError: No module named 'a_module_that_is_not_there'\n"
    assert completed.stderr == reason

    package.rename(package.with_name("elsewhere"))
    completed = run(environment / "bin" / "python", "-c", "print('started')", "litgpt")
    assert (completed.stdout, completed.stderr) == ("started\n", "")


TIME_PTH_LINE = """
import sys, time
line = open(sys.argv[1]).read()
start = time.perf_counter()
exec(line)
print(time.perf_counter() - start, "akl.cli.startup" in " ".join(sys.modules))
"""

TIME_START_FILE = """
import sys, time
finders = len(sys.meta_path)
start = time.perf_counter()
from litgpt_akl.cli.startup import watch
watch()
print(time.perf_counter() - start, len(sys.meta_path) > finders)
"""


def test_other_programs_start_within_a_millisecond(environment, wheel):
    pip(environment, "install", wheel)
    pth = environment / SITE_PACKAGES / "litgpt_akl.pth"
    line = environment / "line.txt"
    pth.rename(line)
    # Python before 3.15 runs the line, later ones call `watch`; the command line must not hold the program's text
    for program, name in ((TIME_PTH_LINE, "line.py"), (TIME_START_FILE, "start.py")):
        (environment / name).write_text(program)
        results = [run(environment / "bin" / "python", environment / name, line).stdout.split() for _ in range(9)]
        assert {watching for _, watching in results} == {"False"}
        assert statistics.median(float(seconds) for seconds, _ in results) < 1e-3


def test_importing_the_package_imports_nothing_heavy(environment, wheel):
    pip(environment, "install", wheel)
    program = (
        "import sys, litgpt_akl, litgpt_akl.cli.main; print(litgpt_akl.__file__); print(*dir(litgpt_akl));"
        "print(*{'torch', 'litgpt', 'lightning', 'jsonargparse'} & set(sys.modules)); print(litgpt_akl.__version__)"
    )
    file, names, heavy, version = run(environment / "bin" / "python", "-c", program).stdout.splitlines()
    assert Path(file).is_relative_to(environment)
    assert {"forward_kl", "adaptive_kl_weight", "DistillationLoss", "__version__"} <= set(names.split())
    assert heavy == ""
    assert wheel.name.startswith(f"litgpt_akl-{version}-")


def test_public_names_are_the_ones_of_their_modules():
    import litgpt_akl
    import litgpt_akl.loss.distillation_loss
    import litgpt_akl.loss.divergences

    assert litgpt_akl.adaptive_kl is litgpt_akl.loss.divergences.adaptive_kl
    assert litgpt_akl.DistillationLoss is litgpt_akl.loss.distillation_loss.DistillationLoss
    with pytest.raises(AttributeError, match="no attribute 'adaptve_kl'"):
        litgpt_akl.adaptve_kl  # noqa: B018
