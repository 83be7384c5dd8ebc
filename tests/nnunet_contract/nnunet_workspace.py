"""nnU-Net's commands, run on a tiny dataset."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

DATASET = "Dataset501_Tiny"
MODEL = "GASNetTrainer__nnUNetPlans__3d_fullres"
SCRIPTS = Path(sysconfig.get_path("scripts"))


@dataclass(frozen=True)
class Workspace:
    """nnU-Net's folders, and its commands on them."""

    root: Path
    results: Path
    trainers: str = ""

    @property
    def raw(self) -> Path:
        return self.root / "raw" / DATASET

    @property
    def preprocessed(self) -> Path:
        return self.root / "preprocessed" / DATASET

    @property
    def model(self) -> Path:
        return self.results / DATASET / MODEL

    def environment(self) -> dict[str, str]:
        """Few processes, and nothing of the caller's nnU-Net."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")},
            "nnUNet_raw": str(self.root / "raw"),
            "nnUNet_preprocessed": str(self.root / "preprocessed"),
            "nnUNet_results": str(self.results),
            "nnUNet_extTrainer": self.trainers,
            "nnUNet_n_proc_DA": "0",
            "nnUNet_def_n_proc": "1",
            "nnUNet_compile": "f",
            "MATPLOTLIBRC": str(self.root),
        }

    def start(self, command: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
        """Start a command in a process group of its own."""
        return subprocess.Popen(
            [str(SCRIPTS / command), *map(str, arguments)],
            env=self.environment() | options.pop("environment", {}),
            encoding="utf-8",
            start_new_session=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )

    def run(self, command: str, *arguments: object, status: int = 0, **options: Any) -> str:
        """Run a command to its end, which leaves no process behind; what it wrote, with "stderr:" in between."""
        process = self.start(command, *arguments, **options)
        try:
            out, err = process.communicate(timeout=900)
            left = left_behind(process)
        finally:
            kill_group(process)
        assert process.returncode == status, f"{command} ended with {process.returncode}\n{out[-3000:]}\n{err[-5000:]}"
        assert not left, f"{command} left processes behind: {left}"
        return f"{out}\nstderr:\n{err}"

    def train(self, *arguments: object, trainer: str = "GASNetTrainer", **options: Any) -> str:
        """`nnUNetv2_train` of the dataset on the CPU."""
        return self.run("nnUNetv2_train", 501, *arguments, "-tr", trainer, "-device", "cpu", **options)

    def call(self, command: str, *arguments: object) -> str:
        """A command by its entry point, in this process, which has everything imported already."""
        (entry,) = importlib.metadata.entry_points(group="console_scripts", name=command)
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            for name, value in self.environment().items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", [command, *map(str, arguments)])
            threads = torch.get_num_threads()
            try:
                entry.load()()
            finally:
                torch.set_num_threads(threads)
        return out.getvalue()

    def predict(self, out: Path, *, model: str = MODEL, checkpoint: str = "checkpoint_final.pth") -> Path:
        """`nnUNetv2_predict` on the unseen patients, with probabilities; the folder of the predictions."""
        trainer, plans, configuration = model.split("__")
        names = ("-d", 501, "-tr", trainer, "-p", plans, "-c", configuration, "-f", 0, "-chk", checkpoint)
        one_process = ("-npp", 0, "-nps", 0, "-device", "cpu", "--disable_progress_bar")
        self.call(
            "nnUNetv2_predict", "-i", self.raw / "imagesTs", "-o", out, *names, *one_process, "--save_probabilities"
        )
        return out

    def write_plans(self, name: str, **settings: Any) -> None:
        """Another plans file for the same preprocessed cases."""
        plans = json.loads((self.preprocessed / "nnUNetPlans.json").read_text(encoding="utf-8"))
        plans["plans_name"] = name
        plans["configurations"]["3d_fullres"]["gasnet"].update(settings)
        (self.preprocessed / f"{name}.json").write_text(json.dumps(plans))

    def with_results(self, folder: Path, **changes: Any) -> Workspace:
        """The same data with another folder of results."""
        folder.mkdir(parents=True, exist_ok=True)
        return replace(self, results=folder, **changes)


def left_behind(process: subprocess.Popen[str]) -> list[str]:
    """Processes of a command that ended, after the moment that Python's resource tracker needs to end too."""
    end = time.monotonic() + 10
    while True:
        listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True)
        fields = [line.split(None, 2) for line in listed.stdout.splitlines()]
        left = [" ".join(field) for field in fields if field[0] == str(process.pid) and field[1][0] != "Z"]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.2)


def kill_group(process: subprocess.Popen[str]) -> None:
    """kill -9 a command with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
