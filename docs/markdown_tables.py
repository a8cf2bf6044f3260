"""Tables of Markdown pages, for the scripts that write them."""

from pathlib import Path

from nvae_tf.io.files import write_text


def markdown(rows: list[list[str]]) -> list[str]:
    """The lines of a table.

    Args:
        rows: The cells of each row; the first row is the header.
    """
    header, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return [header, "|" + " --- |" * len(rows[0]), *others]


def filled(page: str, tables: list[list[str]]) -> str:
    """A page with the rows of its tables replaced.

    Args:
        page: Markdown.
        tables: Lines of tables, in the order of the page. The header of each is that of a table in the
            page; of several with that header it is the first below the table before.

    Raises:
        ValueError: The page has no table with such a header.
    """
    lines, last = page.split("\n"), 0
    for table in tables:
        first = last = lines.index(table[0], last)
        while lines[last].startswith("|"):
            last += 1
        lines[first:last] = table
        last = first + len(table)
    return "\n".join(lines)


def write_tables(page: Path, tables: list[list[str]]) -> None:
    """Replaces the tables of a page, as `filled` does, and prints them.

    Args:
        page: Path of the page.
        tables: As for `filled`.
    """
    print("\n".join("\n".join([*table, ""]) for table in tables))  # first, as they took long
    write_text(page, filled(page.read_text(encoding="utf-8"), tables))
    print(f"written: {page}")
