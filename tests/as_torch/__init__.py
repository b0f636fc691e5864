"""Tables of layers and of ways to use a torch module, and the page that shows how they meet."""
