"""The commands `opensora track …`: what is recorded but not sent yet, and sending it."""

import typer

from opensora.cli_options import RUNS, Workdir

track = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at what runs recorded, and send the rest.")


@track.command()
def status(workdir: Workdir = RUNS) -> None:
    """List the spools of all runs: records, those that the store has not got, and those that it refused.

    \b
    opensora track status
    """
    from opensora.tracking.drain import look
    from opensora.tracking.spool import find_spools
    from opensora.tracking.store import store_name

    root = workdir.resolve()
    states = [look(root, place) for place in find_spools(root)]
    print(f"store {store_name(root)}")
    if not states:
        print(f"no runs below {workdir}")
        return
    width = max(len(state.run) for state in states)
    print(f"{'run':<{width}}  {'records':>9}  {'unsent':>9}  {'rejected':>9}")
    for state in states:
        live = "  being sent" if state.in_use else ""
        print(f"{state.run:<{width}}  {state.records:>9,}  {state.unsent:>9,}  {state.rejected:>9,}{live}")


@track.command()
def replay(
    workdir: Workdir = RUNS,
    rejected: bool = typer.Option(False, "--rejected", help="Offer what the store refused once more, too."),
) -> None:
    """Send what runs recorded while there was no server, to MLFLOW_TRACKING_URI or the file below WORKDIR.

    What the store has already is not made twice. Exit code 1: the store is away, or refused something.

    \b
    MLFLOW_TRACKING_URI=http://mlflow:5000 opensora track replay
    """
    from opensora.config import UserError
    from opensora.tracking.drain import SpoolState, look, retry_rejected
    from opensora.tracking.drain import replay as send
    from opensora.tracking.spool import find_spools
    from opensora.tracking.store import store_name

    root = workdir.resolve()
    if rejected:
        advice = "a process sends it, so that what was refused waits; start this again when that ends"
        count = retry_rejected(root, lambda state: print(f"{state.run}: {advice}"))
        print(f"{count:,} refused records are offered again")
    refused_before = {place: look(root, place).rejected for place in find_spools(root)}
    refused = 0

    def tell(state: SpoolState, sent: int) -> None:
        nonlocal refused
        refused += state.rejected - refused_before.get(state.place, 0)
        if state.in_use:
            print(f"{state.run}: {state.unsent:,} records wait, which a process sends now")
        else:
            print(f"{state.run}: {sent:,} records sent from {state.place}")

    count = send(root, tell)
    left = sum(look(root, place).unsent for place in find_spools(root))
    print(f"{count} spools sent to {store_name(root)}; {left:,} records left")
    if refused:
        raise UserError(f"{refused:,} records were refused; rejected.jsonl beside the spools says why")
