"""Files and paths: atomic writes, locks, bounded readers, and errors that users see."""
