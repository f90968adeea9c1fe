"""The clients of all languages against a real server: clients/CONFORMANCE.md says what is compared."""
