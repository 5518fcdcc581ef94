"""`blixard token create | list | revoke`."""

from __future__ import annotations

import datetime as dt
from typing import Annotated

import typer

from blixard.cli.invocation import Invocation
from blixard.cli.output import note, print_json, print_line, print_table, show_time
from blixard.cli.quantities import read_seconds
from blixard.cli.root import PLAIN, examples
from blixard.protocol.workers import CreateTokenRequest, Scope, TokenView

app = typer.Typer(rich_markup_mode=PLAIN)
group = typer.Typer(rich_markup_mode=PLAIN, no_args_is_help=True, help="Create, list and revoke access tokens.")
app.add_typer(group, name="token")
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


# A second, nameless command group around one group: without it Typer would make `token` the program itself.
@app.callback()
def _() -> None: ...


@group.command(
    help="Create a token and print it. It is shown this once; only a hash of it is kept.\n\n"
    "Scopes: read (look), submit (also run, cancel, retry), worker (claim jobs and report them), admin (everything).",
    epilog=examples(
        "token create laptop --scope read --scope submit", "token create farm --scope worker --expires 30d"
    ),
)
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is, for the list.")],
    scope: Annotated[list[Scope], typer.Option(metavar="SCOPE", help="read, submit, worker or admin. Repeatable.")],
    expires: Annotated[str | None, typer.Option(metavar="TIME", help="Valid for so long: 12h, 30d.")] = None,
    as_json: Json = False,
) -> int:
    invocation: Invocation = ctx.obj
    request = CreateTokenRequest(
        name=name,
        scopes=tuple(dict.fromkeys(scope)),
        expires_in=None if expires is None else read_seconds(expires, "--expires"),
    )
    reply = invocation.call(lambda client: client.create_token(request))
    if as_json:
        print_json(reply)
        return 0
    print_line(reply.secret)
    if not invocation.quiet:
        until = f"until {show_time(reply.token.expires_at)}" if reply.token.expires_at else "without an end"
        note(f"token {reply.token.id} ({', '.join(reply.token.scopes)}), valid {until}; it is not shown again")
        note("use it as BLIXARD_TOKEN, or as token in the section [server] of the configuration")
    return 0


@group.command(
    name="list", help="List tokens, without their secrets.", epilog=examples("token list", "token list --json")
)
def list_tokens(ctx: typer.Context, as_json: Json = False) -> int:
    invocation: Invocation = ctx.obj
    found = invocation.call(lambda client: client.tokens())
    if as_json:
        print_json(found)
        return 0
    now = dt.datetime.now(dt.UTC)
    print_table(
        ("ID", "NAME", "STATE", "SCOPES", "CREATED", "EXPIRES", "LAST USED"),
        [_token_row(token, now) for token in found],
    )
    return 0


def _token_row(token: TokenView, now: dt.datetime) -> tuple[str, ...]:
    expired = token.expires_at is not None and token.expires_at <= now
    state = "revoked" if token.revoked_at else "expired" if expired else "valid"
    return (
        token.id,
        token.name,
        state,
        ", ".join(token.scopes),
        show_time(token.created_at),
        show_time(token.expires_at),
        show_time(token.last_used_at),
    )


@group.command(help="Revoke a token: it is refused from now on.", epilog=examples("token revoke token_01jd…"))
def revoke(
    ctx: typer.Context, token_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the token, from the list.")]
) -> int:
    invocation: Invocation = ctx.obj
    token = invocation.call(lambda client: client.revoke_token(token_id))
    print_line(f"{token.id}\trevoked")
    return 0
