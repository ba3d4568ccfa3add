"""Progress where there is no terminal."""

import io

from rich.console import Console

from lowbit_jax.progress import Progress


def shown(every_s, terminal=False):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=80)
    with Progress(console=console, every_s=every_s) as bar:
        task = bar.add_task("blocks", total=4)
        for _ in range(4):
            bar.advance(task)
        bar.update(task, description="blocks again")
    return file.getvalue()


def test_a_log_file_gets_plain_lines():
    lines = shown(0.0).split("\n")
    assert [line.split(",")[0] for line in lines[:4]] == [f"blocks: {i}/4" for i in range(1, 5)]
    assert "s left" in lines[2]
    assert lines[4].startswith("blocks again: 4/4")


def test_lines_are_few_but_the_end_is_told():
    lines = shown(1e9).strip().split("\n")
    assert [line.split(",")[0] for line in lines] == ["blocks: 1/4", "blocks: 4/4"]


def test_a_terminal_gets_a_bar_alone():
    assert "blocks: 1/4" not in shown(0.0, terminal=True)
