"""The routes of the HTTP interface, one router for each kind of caller and thing."""
