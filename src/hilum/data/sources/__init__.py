"""One file per public dataset: its folder and CSV layout to manifest rows. A source never imports another source."""
