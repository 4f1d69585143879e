"""Results as data, as tables of text and as figures."""
