"""Runs when Python starts, if its folder is on the path (`python -m host_cann run`). See host_cann/redirect.py."""

from host_cann.redirect import watch

watch()
