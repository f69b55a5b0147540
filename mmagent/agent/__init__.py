"""What an agent does with what its model understands: rules, tools, templates. No torch in here."""
