"""The chat page: Gradio, speaking HTTP to the API like any app."""
