"""Opens the web page: `python app.py [--host] [--port] [--workspace] [--share] [--auth name:password]`."""

from __future__ import annotations

import argparse
import errno
import ipaddress
import os
import socket
import sys
from pathlib import Path

from reparam_diffusion.errors import UserError, explain_os_error
from reparam_diffusion.printable import hush_libraries, printable
from reparam_diffusion.workspace import require_workspace

LARGEST_FILE = "4gb"  # an SDXL adapter dropped into the gallery; pictures have a limit of their own
SPACE_HOST = "0.0.0.0"  # a Space's container is reached from outside through Hugging Face alone


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description="Open the page that trains, tries and exports adapters.")
    parser.add_argument(
        "--host",
        default=SPACE_HOST if is_space() else "127.0.0.1",
        help="address to listen on (default: this machine only)",
    )
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    parser.add_argument("--workspace", type=Path, default=Path("workspace"), help="folder for everything that is made")
    parser.add_argument("--share", action="store_true", help="also give a public link; needs --auth")
    parser.add_argument("--auth", metavar="NAME:PASSWORD", help="ask every visitor for this name and password")
    return parser.parse_args(arguments)


def check_safe(options: argparse.Namespace) -> tuple[str, str] | None:
    """The name and password, if any. Raises UserError when the page would be open to strangers without one."""
    auth: tuple[str, str] | None = None
    if options.auth:
        name, colon, password = options.auth.partition(":")
        if not (name and colon and password):
            raise UserError("--auth is not complete.", do="Write it as --auth name:password.")
        auth = name, password
    if auth is None and (options.share or not (is_loopback(options.host) or is_space())):
        what = "--share" if options.share else f"--host {options.host}"
        raise UserError(
            f"{what} needs --auth.",
            "Without it anyone who finds the page could use this machine and see its pictures.",
            "Add --auth name:password.",
        )
    return auth


def check_address(host: str, port: int | None) -> None:
    """Raise UserError for an address or a port that cannot be listened on."""
    if port is not None and not 1 <= port <= 65535:
        raise UserError(f"--port {port} is not possible.", do="Choose a port from 1024 to 65535.")
    try:
        kind, _, _, _, place = socket.getaddrinfo(host.strip("[]"), port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind) as trial:
            if os.name == "posix":
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(place)
    except socket.gaierror:
        raise UserError(f"--host {host} is not an address.", do="Use 127.0.0.1 or 0.0.0.0.") from None
    except UnicodeError:
        raise UserError(f"--host {host} is not an address.", do="Use 127.0.0.1 or 0.0.0.0.") from None
    except PermissionError:
        raise UserError(f"Port {port} needs administrator rights.", do="Choose a port above 1023.") from None
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(
                f"--host {host} is not an address of this machine.", do="Use 127.0.0.1 or 0.0.0.0."
            ) from None
        raise UserError(
            f"Port {port} is in use.", "Another program, or another page, listens there.", "Choose another --port."
        ) from None


def is_space() -> bool:
    """Whether this runs as a Hugging Face Space, whose own settings say who may see it."""
    return "SPACE_ID" in os.environ


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def main(arguments: list[str] | None = None) -> int:
    """Serve the page until Ctrl-C."""
    options = read_options(arguments)
    hush_libraries()
    try:
        return serve(options, check_safe(options))
    except UserError as error:
        return _refuse(error)
    except OSError as error:
        explained = explain_os_error(error)
        if explained is None:
            raise
        return _refuse(explained)


def _refuse(error: UserError) -> int:
    sys.stderr.write(f"Error: {printable(str(error))}\n")
    return 2


def serve(options: argparse.Namespace, auth: tuple[str, str] | None) -> int:
    """Build the page and serve it until Ctrl-C. Raises UserError before anything is loaded."""
    require_workspace(options.workspace)
    check_address(options.host, options.port)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("GRADIO_RUN_HISTORY", "False")  # not an argument in the oldest gradio we take
    from ui.literal import SCRIPT
    from ui.page import build_page
    from ui.theme import STYLES, make_theme

    build_page(options.workspace).launch(
        server_name=options.host,
        server_port=options.port,
        share=options.share,
        auth=auth,
        theme=make_theme(),
        css_paths=STYLES,
        head=SCRIPT,
        max_file_size=LARGEST_FILE,
        footer_links=[],
        enable_monitoring=False,
        show_error=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
