"""What the machine has and what is missing here."""
