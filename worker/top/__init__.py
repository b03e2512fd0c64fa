"""The terminal application `worker top`. It needs the extra `top`; no other package imports textual."""
