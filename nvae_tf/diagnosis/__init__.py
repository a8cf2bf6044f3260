"""What `nvae-doctor` finds out about a machine."""
