"""Links in folders that are published: what lies outside is neither read nor sent."""

from pathlib import Path


def check_links(folder: Path, pattern: str = "**/*") -> None:
    """Raise ValueError for a link that leads out of the folder, or nowhere.

    Hidden files are not looked at: they are not published.
    """
    inside = folder.resolve()
    for path in sorted(folder.glob(pattern)):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_symlink() and not hidden and not _leads_into(path, inside):
            raise ValueError(f"{path} is a link out of the folder: put the file itself there")


def _leads_into(link: Path, folder: Path) -> bool:
    try:
        return link.resolve(strict=True).is_relative_to(folder)
    except (OSError, RuntimeError):  # nothing is there, or links go in a circle
        return False
