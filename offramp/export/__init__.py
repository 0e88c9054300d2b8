"""Everything that writes a bundle: capture, cut, lower, verify, build. Import the module you need."""
