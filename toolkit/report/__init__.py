"""What a finished run has to show, as one HTML page; and several runs side by side."""
