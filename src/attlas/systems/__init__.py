"""Systems: whole jobs built from a paper, one file a paper; `attlas run NAME` runs one."""
