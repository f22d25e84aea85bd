"""Links in folders that are published: what lies outside is neither read nor sent."""

from pathlib import Path


def check_links(folder: Path, pattern: str = "**/*") -> None:
    """Raise ValueError for a link that leads out of the folder, or nowhere.

    Hidden files are not looked at: they are not published.
    """
    for path in sorted(folder.glob(pattern)):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_symlink() and not hidden:
            check_inside(path, folder)


def check_inside(path: Path, folder: Path) -> None:
    """Raise ValueError unless what a path leads to lies in the folder."""
    try:
        inside = path.resolve(strict=True).is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # nothing is there, or links go in a circle
        inside = False
    if not inside:
        raise ValueError(f"{path} is a link out of the folder: put the file itself there")
