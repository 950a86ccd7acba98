"""What several test files share: material of every kind, faults, and surveys of them."""
