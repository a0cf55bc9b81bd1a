"""What people bring as a base, opened and read the same way, whatever kind of file it is."""
