"""What each command does: a thin call into the library, imported when it is given."""
