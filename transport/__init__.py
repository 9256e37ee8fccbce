"""How the nodes of a run reach each other: unix sockets on one host, and between hosts TLS with the
run's own key in front of them. docs/security.md says what that protects."""
