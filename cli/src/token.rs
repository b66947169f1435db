//! `millpond token …`: API tokens, made and revoked by the running broker.

use clap::Subcommand;
use millpond_client::Client;
use millpond_protocol::control::TokenView;
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::moment;
use crate::output::{self, Column, Format};

#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token and print it. This is the only time that it is shown.
    New { name: String },
    /// List the tokens by name.
    List,
    /// Revoke a token; its connections end.
    Revoke { name: String },
}

/// Does what the command says.
pub async fn run(command: TokenCommand, client: &Client, format: Format) -> Result<(), Failure> {
    match command {
        TokenCommand::New { name } => {
            let token = client.new_token(&name).await?;
            match format {
                Format::Json => output::json(&json!({"name": name, "token": token})),
                Format::Human => output::line(token),
            }
        }
        TokenCommand::List => {
            let tokens = client.tokens().await?;
            match format {
                Format::Json => output::json(&tokens.iter().map(to_json).collect()),
                Format::Human => table(&tokens),
            }
        }
        TokenCommand::Revoke { name } => {
            client.revoke_token(&name).await?;
            output::done(format, &format!("revoked token {name}"))
        }
    }
}

fn to_json(view: &TokenView) -> Value {
    json!({"name": view.name, "created_at": moment::rfc3339(view.created_at)})
}

fn table(tokens: &[TokenView]) -> Result<(), Failure> {
    let columns = [Column::Left("TOKEN"), Column::Left("CREATED")];
    let row = |view: &TokenView| vec![view.name.clone(), moment::short(view.created_at)];
    output::table(&columns, tokens.iter().map(row), "no tokens")
}
