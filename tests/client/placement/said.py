"""What a command that goes on prints, as it comes."""

import argparse
import asyncio
import re

import pytest

from expertd.client.placement.rebalance import add_arguments


class Said:
    """In one test at a time, which waits for what it expects."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys, self.text = capsys, ""
        self.all = ""

    async def wait_for(self, pattern: str) -> re.Match[str]:
        """Its first occurrence after the last one that was waited for. Raises `TimeoutError`."""
        async with asyncio.timeout(60):
            while not (found := re.search(pattern, self.text)):
                await asyncio.sleep(0.02)
                self._read()
        self.text = self.text[found.end() :]
        return found

    def forget(self) -> None:
        """What was printed until now is not waited for any more."""
        self._read()
        self.text = ""

    def _read(self) -> None:
        more = self._capsys.readouterr().out
        self.text, self.all = self.text + more, self.all + more


def rebalance_arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)
