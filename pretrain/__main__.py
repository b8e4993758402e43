"""The `pretrain` command."""

from __future__ import annotations

import sys

from lit_gpt.errors import EXIT_OK, EXIT_STOPPED, EXIT_USAGE, run_command


def main() -> int:
    """Entry point of the console script; the exit code says how the run ended."""
    return run_command(_main)


def _main() -> int:
    argv = sys.argv[1:]
    if argv[:1] == ["data"]:
        from pretrain.data_command import main as data_main

        return data_main(argv[1:])
    if argv[:1] == ["status"]:
        from pretrain.status import main as status_main

        return status_main(argv[1:])
    if argv[:1] == ["validate"]:
        from pretrain.validate_command import main as validate_main

        return validate_main(argv[1:])
    from pretrain.signals import StopRequested, StopSignal

    # first of all, as a signal would kill; and until the process is gone, as a late one would change its exit code
    stop = StopSignal()
    stop.consequence = "stopping before the first step"
    stop.listen()
    from pretrain.command_line import build_parser, parse

    if not argv:
        build_parser().print_help(sys.stderr)
        return EXIT_USAGE
    if "--stages.help" in argv:
        build_parser().parse_args(["--stages.help"])  # prints the fields of a stage and exits
    if {"-h", "--help"} & set(argv):
        build_parser().print_help()
        return EXIT_OK
    invocation = parse(argv)
    # torch takes seconds to import: only now, when the settings are known to be good
    from pretrain.run import run

    try:
        run(invocation, ["pretrain", *argv], stop)
    except StopRequested as end:
        sys.stderr.write(f"{end}\n")
        return EXIT_STOPPED
    finally:
        stop.end_listening()
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
