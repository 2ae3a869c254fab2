"""Lines of code by folder of clipid_utils, without docstrings, comments and blank lines; files and functions too long.

    python scripts/count_lines.py [FOLDER]
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

MOST_FILE, MOST_FUNCTION = 350, 60  # lines of the file
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
           tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """How many lines have code that is not a docstring or a comment."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def too_long(path: Path, source: str) -> list[str]:
    """The file and those of its functions that are longer than the project's limits."""
    count = source.count("\n")
    found = [f"{path}: {count} lines"] if count > MOST_FILE else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > MOST_FUNCTION:
                found.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    return found


def main() -> None:
    root = Path(sys.argv[1] if sys.argv[1:] else Path(__file__).resolve().parents[1] / "clipid_utils")
    folders, files, long = Counter(), 0, []
    for path in sorted(root.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        inside = path.relative_to(root)
        folders["/".join(inside.parts[:-1]) or "."] += code_lines(source)
        files += 1
        long += too_long(inside, source)
    for folder, lines in sorted(folders.items()):
        print(f"{lines:6,} {folder}")
    print(f"{folders.total():6,} lines of code in {files} files")
    print("\n".join(long))


if __name__ == "__main__":
    main()
