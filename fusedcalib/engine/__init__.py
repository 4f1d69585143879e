"""One step of an optimizer: what it is asked for, the plan that fits, what is decided, the launches."""
