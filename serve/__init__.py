"""An OpenAI-compatible server and a chat page over run folders."""
