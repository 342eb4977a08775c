"""What can be taught beside a frozen base; one file a kind."""
