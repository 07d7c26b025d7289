"""Text of users, files and help is shown as it is: no Markdown, HTML or markup of a terminal eats a letter of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from page_browser import open_browser
from PIL import Image
from typer.testing import CliRunner

from reparam_diffusion import __main__ as program
from reparam_diffusion import events as e
from reparam_diffusion.data.images import Picture, Refused
from reparam_diffusion.errors import UserError
from reparam_diffusion.jobs import console
from reparam_diffusion.jobs.datasets import PictureSet
from ui import door, fragments
from ui.literal import SCRIPT, literal, plain
from ui.page import build_page

TEXTS = [
    "*attn2* lokr factor=4", "unet.*attn*, te1.*", "_x_ __y__", "**bold**", "`code`", "[a](http://x)", "![i](x)",
    "<b>x</b>", "<img src=x onerror=alert(1)>", "[red]x[/red]", "[/]", "$x$ $$y$$", r"\(x\) a\*b", "# head", "- item",
    "1. one", "~~s~~", "&amp; &lt;", "{trigger} {0}", "a_b_c", "| a | b |", "http://example.com", "%s %d",
]  # fmt: skip
EATEN = [r"`[^`]+`", r"\[[^\]]+\]\([^)]+\)", r"\*.+?\*", r"__.+?__", r"(?<!\w)_.+?_(?!\w)"]
"""What gradio's help lines take for Markdown."""


@pytest.mark.parametrize("text", TEXTS)
def test_a_help_line_has_nothing_that_gradio_eats(text: str) -> None:
    assert plain(literal(text)) == text
    assert not any(re.search(pattern, literal(text)) for pattern in EATEN)


def test_no_help_line_of_the_page_is_eaten(tmp_path: Path) -> None:
    page = build_page(tmp_path)
    lines = [line for block in page.blocks.values() if isinstance(line := getattr(block, "info", None), str)]
    assert len(lines) > 50
    for line in lines:
        assert not any(re.search(pattern, line) for pattern in EATEN), line
    assert not any(isinstance(block, gr.Markdown) for block in page.blocks.values())


def test_the_browser_shows_every_text_as_it_is() -> None:
    with gr.Blocks(analytics_enabled=False) as page:
        boxes = [
            gr.Textbox(label=text, info=literal(text), elem_id=f"box{number}") for number, text in enumerate(TEXTS)
        ]
        press = gr.Button("Change", elem_id="change")
        press.click(lambda: [gr.update(info=literal(f"⚠ {text}")) for text in TEXTS], None, boxes)
        toast = gr.Button("Toast", elem_id="toast")
        toast.click(lambda: [door.warn(text) for text in TEXTS[:8]] and None, None, None)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, head=SCRIPT)
    try:
        with open_browser() as browser:
            shown = browser.new_page()
            shown.goto(address)
            shown.wait_for_selector(f"#box{len(TEXTS) - 1} .info-text")
            for number, text in enumerate(TEXTS):
                assert shown.locator(f"#box{number} .info-text").inner_text() == text
                assert shown.locator(f"#box{number} [data-testid=block-info]").first.inner_text() == text
            shown.click("#change")
            shown.wait_for_function("document.querySelector('#box0 .info-text').innerText.startsWith('⚠')")
            shown.wait_for_timeout(500)
            for number, text in enumerate(TEXTS):
                assert shown.locator(f"#box{number} .info-text").inner_text() == f"⚠ {text}"
            shown.click("#toast")
            for text in TEXTS[:8]:
                shown.get_by_test_id("toast-body").get_by_text(text, exact=True).first.wait_for(timeout=20_000)
    finally:
        page.close()


# --- HTML ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", TEXTS)
def test_fragments_and_toasts_escape(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from html import unescape

    file = tmp_path / f"{text.replace('/', '')}.png"
    Image.new("RGB", (8, 8)).save(file)
    chosen = PictureSet((Picture(file, 8, 8, "0", caption=text),), (Refused(file, text),))
    told: list[str] = []
    monkeypatch.setattr(gr, "Warning", told.append)
    door.warn(text)
    with pytest.raises(gr.Error) as caught:
        door.guarded(lambda: (_ for _ in ()).throw(UserError(text, text, text)), tmp_path)()
    pieces = [fragments.strip_of(chosen), fragments.captions_of(chosen), told[0], str(caught.value.message)]
    for piece in pieces:
        assert text in unescape(piece)
        assert "<b>x" not in piece and "<img src=x" not in piece


# --- the terminal ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", [*TEXTS, "\x1b[31mred"])
def test_a_run_on_a_terminal_shows_texts_as_they_are(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = e.Started(
        method=text, steps=1, first_step=1, sites=1, parameters=1, file_bytes=1, device=text, precision=text,
        pictures=1, ranks={}, sets=[text], processes=1,
    )  # fmt: skip
    console.show([started, e.Prepared(text, 1, 2), e.Warned(text), e.Failed(text, text, text)], tmp_path)
    shown = " ".join(capsys.readouterr().out.split())
    expected = " ".join(text.replace("\x1b", "\\u001b").split())
    assert f"Note: {expected}" in shown and f"Failed: {expected}" in shown and "\x1b[31m" not in shown


def test_the_help_of_every_command_is_whole() -> None:
    """Words in brackets are markup to rich, which typer prints with."""
    import typer.main

    group: Any = typer.main.get_command(program.app)
    for name, command in group.commands.items():
        shown = (
            CliRunner().invoke(program.app, [name, "--help"], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"}).output
        )
        shown = re.sub(r"[\s│]+", " ", shown)
        for parameter in command.params:
            help_text = " ".join((getattr(parameter, "help", "") or "").split())
            assert help_text in shown, (name, parameter.name)
