"""Update rules, one file each: the device maths, the host numbers it needs, and the class a user calls."""
