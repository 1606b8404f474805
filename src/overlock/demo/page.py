"""The page as a whole: its tabs, its looks, and the server that keeps to this machine unless told otherwise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it when it is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
from starlette.middleware import Middleware

from overlock.demo.compare_tab import lay_out_comparison
from overlock.demo.dense_tab import lay_out_detection, lay_out_segmentation
from overlock.demo.guard import Guard
from overlock.demo.look_tab import LookTab
from overlock.demo.stock import Stock

TITLE = "OverLoCK: overview first, look closely next"
KEPT = 3600  # seconds that pictures and uploads stay on the disk, and a visit in memory after its last event
WAITING = 40  # events in the queue; the next is told to come again
SYSTEM_FONTS = ("system-ui", "sans-serif")


def make_page(stock: Stock) -> gr.Blocks:
    """The page of networks and photos, which has seen the first photo."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT // 4, KEPT)) as page:
        gr.Markdown(
            f"# {TITLE}\nWhat [OverLoCK](https://arxiv.org/abs/2502.20087) sees in a photo. All is computed by the "
            "machine that serves this page; nothing goes anywhere else."
        )
        with gr.Tabs():
            with gr.Tab("Look inside", id="look"):
                look = LookTab(stock)
            with gr.Tab("Detection", id="detect"):
                lay_out_detection(stock)
            with gr.Tab("Segmentation", id="segment"):
                lay_out_segmentation(stock)
            with gr.Tab("Compare", id="compare"):
                lay_out_comparison(stock)
        look.connect(page)
    look.warm_up()
    return page.queue(max_size=WAITING, default_concurrency_limit=4)


def serve(page: gr.Blocks, *, host: str, port: int, max_megabytes: int) -> str:
    """Serve a page, beside what this process does further; :meth:`gradio.Blocks.block_thread` waits for Ctrl-C.

    Args:
        page: of :func:`make_page`.
        host: address to listen at; 127.0.0.1 for this machine alone.
        port: of it.
        max_megabytes: of an upload.

    Returns:
        Its address.

    Raises:
        ValueError: for a port that is taken, or an address that is not this machine's.
    """
    style = Path(__file__).with_name("style.css")
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
            max_file_size=f"{max_megabytes}mb", theme=make_theme(), css=style.read_text(), footer_links=[],
            enable_monitoring=False, run_history=False, state_session_capacity=64, show_error=False,
            app_kwargs=dict(middleware=[Middleware(Guard)]),
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"{host}:{port} cannot be listened at ({error}); choose another --port or --host") from None
    return address


def make_theme() -> Any:
    """Gradio's plain one, in fonts that every machine has."""
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=("monospace",))
    return theme.set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300")
