"""From files of talk to tokens and labels."""
