"""The shell around all commands: messages, exit statuses and a quick start."""

from __future__ import annotations

import signal
import subprocess
import sys

from gasnet_nnunet import __version__


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code that ends in `main()`, with the command line's arguments."""
    command = [sys.executable, "-c", f"{code}\nfrom gasnet_nnunet.cli import app, main\nmain()", *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


def run_command(body: str) -> subprocess.CompletedProcess[str]:
    """Run a command whose function is `body`."""
    return run(f"from gasnet_nnunet.cli import app\n@app.command()\ndef broken():\n    {body}", "broken")


def test_users_mistake_ends_in_one_message() -> None:
    ended = run_command("from gasnet_nnunet.errors import UserError; raise UserError('ct.nii has shape [1, 2]')")
    assert ended.returncode == 1
    assert ended.stderr == "Error: ct.nii has shape [1, 2]\n"
    assert ended.stdout == ""


def test_full_disk_ends_in_one_message() -> None:
    ended = run_command("import errno; raise OSError(errno.ENOSPC, 'No space left on device', '/data/plans.json')")
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: /data/plans.json cannot be read or written: No space left on device. ")
    assert ended.stderr.count("\n") == 1


def test_interruption_ends_in_one_line() -> None:
    # A shell starts its background jobs with the signal ignored.
    ended = run_command(
        "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"os.kill(os.getpid(), {int(signal.SIGINT)})"
    )
    assert ended.returncode == 130
    assert ended.stderr == "Interrupted.\n"


def test_fault_of_ours_keeps_its_traceback() -> None:
    ended = run_command("1 / 0")
    assert ended.returncode == 1
    assert "ZeroDivisionError" in ended.stderr


def test_version() -> None:
    assert run("", "--version").stdout == f"gasnet-nnunet {__version__}\n"


def test_mistyped_command_is_refused() -> None:
    ended = run("", "docter")
    assert ended.returncode == 2
    assert "docter" in ended.stderr


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = """
import atexit, sys
heavy = {"torch", "nnunetv2", "SimpleITK", "pandas", "scipy", "skimage", "matplotlib"}
atexit.register(lambda: print("heavy:", sorted(heavy & set(sys.modules))))
"""
    ended = run(code, "--help")
    assert ended.returncode == 0
    assert ended.stdout.endswith("heavy: []\n")
    for command in ("doctor", "demo", "convert", "extend", "check", "lungs", "splits", "plan", "study", "compare"):
        assert f" {command} " in ended.stdout
    for command in ("export", "restore", "report"):
        assert f" {command} " in ended.stdout
