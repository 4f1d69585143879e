"""Times the step of any rule beside others', each held against a reference first."""
