from __future__ import annotations

import tomllib

from hypothesis import given
from hypothesis import strategies as st

from blixard.config.toml_lines import find_lines

DOCUMENT = '''\
# a comment
leases.duration = 5

[server]   # another
host = "::1"

port = 1
[worker]
queues = [
    "a", # [log]
    "b",
]
labels = { zone = "x" }
name = """
[log]
level = "debug"
"""
[worker.more]
"odd key" = 1
'''


def test_every_key_is_found_on_the_line_where_it_begins() -> None:
    lines = find_lines(DOCUMENT)
    assert lines == {
        ("leases",): 2,
        ("leases", "duration"): 2,
        ("server",): 4,
        ("server", "host"): 5,
        ("server", "port"): 7,
        ("worker",): 8,
        ("worker", "queues"): 9,
        ("worker", "labels"): 13,
        ("worker", "labels", "zone"): 13,
        ("worker", "name"): 14,
        ("worker", "more"): 18,
        ("worker", "more", "odd key"): 19,
    }


def test_windows_line_ends_are_fine() -> None:
    assert find_lines("[log]\r\n\r\nlevel = 'info'\r\n")["log", "level"] == 3


_names = st.sampled_from(["server", "port", "log", "a-b", "x"])
_values = st.one_of(
    st.integers(-9, 9).map(str),
    st.sampled_from(['"#"', '"""\n[x]\n"""', "[\n1,\n# c\n2]", "{ a = 1 }", "'''\n'''", "true"]),
)


@given(
    st.lists(
        st.tuples(_names, st.dictionaries(_names, _values, max_size=4)), max_size=4, unique_by=lambda pair: pair[0]
    )
)
def test_every_key_of_any_document_has_a_line_that_names_it(tables: list[tuple[str, dict[str, str]]]) -> None:
    text = "\n".join(
        f"[{table}]\n" + "\n".join(f"{name} = {value}" for name, value in keys.items()) for table, keys in tables
    )
    lines, rows = find_lines(text), text.split("\n")
    for table, keys in tomllib.loads(text).items():
        assert rows[lines[table,] - 1] == f"[{table}]"
        for name in keys:
            assert rows[lines[table, name] - 1].startswith(f"{name} = ")
