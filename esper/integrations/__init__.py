"""Training stacks that Esper works in: each module needs the library of its name, and `import esper` none of them."""
