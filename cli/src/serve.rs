//! `millpond serve`: the broker in this process. Standard output gets one line when it is ready;
//! logs go to standard error.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use millpond_broker::{Broker, Config};
use serde_json::json;
use tracing_subscriber::EnvFilter;

use crate::args::Global;
use crate::failure::Failure;
use crate::output::{self, Format};
use crate::signal::Signals;

/// Runs the broker until SIGTERM or Ctrl-C; a second one ends it at once.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Settings, in TOML. Options given here go before them.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where clients connect (UDP) [default: 127.0.0.1:7400].
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Where health and metrics are served (TCP), or `off` [default: 127.0.0.1:8080].
    #[arg(long, value_name = "ADDR|off", value_parser = parse_http)]
    http: Option<Http>,
    /// Make an API token of this name if there is none yet, and tell it once on standard error.
    #[arg(long, value_name = "NAME")]
    first_token: Option<String>,
    /// How logs are written; RUST_LOG says which.
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t)]
    log_format: LogFormat,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Http {
    At(SocketAddr),
    Off,
}

fn parse_http(text: &str) -> Result<Http, std::net::AddrParseError> {
    match text {
        "off" => Ok(Http::Off),
        _ => text.parse().map(Http::At),
    }
}

#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    #[default]
    Text,
    Json,
}

impl ServeArgs {
    fn config(&self, global: &Global) -> Result<Config, Failure> {
        let mut config = Config::load(self.config.as_deref())?;
        if let Some(data) = &global.data {
            config.data.clone_from(data);
        }
        if let Some(listen) = self.listen {
            config.listen = listen;
        }
        match self.http {
            Some(Http::At(address)) => config.http = Some(address),
            Some(Http::Off) => config.http = None,
            None => {}
        }
        if self.first_token.is_some() {
            config.first_token.clone_from(&self.first_token);
        }
        Ok(config)
    }
}

/// Starts, tells so, and waits for the end.
pub async fn run(args: ServeArgs, global: &Global) -> Result<(), Failure> {
    let mut signals = Signals::listen()?;
    log_to_stderr(args.log_format);
    let config = args.config(global)?;
    let data = config.data.display().to_string();
    let broker = tokio::select! {
        broker = Box::pin(Broker::start(config)) => broker?,
        _ = signals.asked() => return Ok(()),
    };
    if let Some(token) = broker.first_token() {
        output::note(format!("API token, shown only this once: {token}"));
    }
    if let Err(failure) = ready(&broker, &data, global.output) {
        // Whoever waits for the line can ask `/ready`; clients need the broker, not the line.
        tracing::warn!(%failure, "nobody could be told that the broker is ready");
    }
    tokio::select! {
        error = broker.failed() => return Err(error.into()),
        stop = signals.asked() => tracing::info!(?stop, "shutting down"),
    }
    Ok(broker.shutdown().await?)
}

fn ready(broker: &Broker, data: &str, format: Format) -> Result<(), Failure> {
    let version = env!("CARGO_PKG_VERSION");
    let (listen, http) = (broker.listen_addr(), broker.http_addr());
    match format {
        Format::Json => output::json(&json!({
            "version": version,
            "listen": listen,
            "http": http,
            "data": data,
            "pid": std::process::id(),
        })),
        Format::Human => {
            let http = http.map_or_else(|| "off".to_owned(), |http| format!("on {http}"));
            output::line(format!(
                "millpond {version} listening on {listen}, http {http}, data in {data}"
            ))
        }
    }
}

fn log_to_stderr(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // It would tell standard error that standard error fails, and panic over it.
        .log_internal_errors(false);
    match format {
        LogFormat::Json => logs.json().init(),
        LogFormat::Text => {
            let colors = std::io::IsTerminal::is_terminal(&std::io::stderr());
            logs.with_ansi(colors).init();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_is_an_address_or_off() {
        assert_eq!(parse_http("off"), Ok(Http::Off));
        assert!(matches!(parse_http("127.0.0.1:0"), Ok(Http::At(_))));
        assert!(parse_http("nowhere").is_err());
    }
}
