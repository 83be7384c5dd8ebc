"""Options that take several values at once, as nnU-Net's commands do: `--set a=1 b=2` beside `--set a=1 --set b=2`."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class VariadicCommand(TyperCommand):
    """A command whose repeatable options also take all their values at once; it has no positional arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option's name before each further value, which is how click wants it."""
        repeatable = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        words: list[str] = []
        option = None
        for word in args:
            if word.startswith("-"):
                option = word if word in repeatable else None
            elif option is not None and words[-1] != option:
                words.append(option)
            words.append(word)
        return super().parse_args(ctx, words)
