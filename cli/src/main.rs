//! The `millpond` command: the broker, its client commands, and the offline log tools.
//!
//! This crate owns arguments, output and exit codes. What a command does is done by
//! `millpond-broker` and `millpond-client`; nothing here knows the wire or the disk.

mod args;
mod connect;
mod dead_letters;
mod descriptors;
mod duration;
mod exec;
mod failure;
mod lines;
mod log;
mod moment;
mod output;
mod peek;
mod policy_args;
mod receive;
mod send;
mod serve;
mod signal;
mod size;
mod status;
mod subscription;
mod text;
mod token;
mod topic;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use tokio::runtime::Runtime;

use crate::args::{Cli, Command, Global, RequestCommand};
use crate::failure::Failure;
use crate::output::Format;
use crate::signal::Signals;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let told = |arg: OsString| arg.to_string_lossy().into_owned();
            let format = wanted_format(std::env::args_os().map(told));
            return ExitCode::from(failure::report_usage(&error, format));
        }
    };
    match run(cli.command, &cli.global) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.report(cli.global.output);
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(command: Command, global: &Global) -> Result<(), Failure> {
    let started = |runtime: std::io::Result<Runtime>| {
        runtime.map_err(|error| Failure::System {
            what: "cannot start threads",
            error,
        })
    };
    let runtime = || started(Runtime::new());
    if let Command::Log(_) | Command::Serve(_) = command {
        descriptors::raise_limit();
    }
    match command {
        Command::Log(command) => log::run(&command, global.output),
        Command::Serve(args) => finish(
            started(millpond_broker::runtime())?,
            serve::run(args, global),
        ),
        Command::Send(args) => finish(runtime()?, send::run(args, global)),
        Command::Receive(args) => finish(runtime()?, receive::run(args, global)),
        Command::Request(command) => finish(runtime()?, ask(command, global)),
    }
}

/// Runs to the end, and does not wait for a thread that reads standard input.
fn finish(
    runtime: Runtime,
    command: impl Future<Output = Result<(), Failure>>,
) -> Result<(), Failure> {
    let result = runtime.block_on(command);
    runtime.shutdown_background();
    result
}

/// Runs a command that asks and prints; it ends at once when it is told to.
async fn ask(command: RequestCommand, global: &Global) -> Result<(), Failure> {
    let mut signals = Signals::listen()?;
    tokio::select! {
        result = Box::pin(request(command, global)) => result,
        stop = signals.asked() => Err(Failure::Stopped(stop)),
    }
}

async fn request(command: RequestCommand, global: &Global) -> Result<(), Failure> {
    let client = connect::connect(global).await?;
    let format = global.output;
    let result = match command {
        RequestCommand::Topic(command) => topic::run(command, &client, format).await,
        RequestCommand::Subscription(command) => subscription::run(command, &client, format).await,
        RequestCommand::DeadLetters(command) => dead_letters::run(command, &client, format).await,
        RequestCommand::Peek(args) => peek::run(&args, &client, format).await,
        RequestCommand::Token(command) => token::run(command, &client, format).await,
        RequestCommand::Status => status::run(&client, format).await,
    };
    client.close().await;
    result
}

/// The format that a command line wants which could not be understood.
fn wanted_format(args: impl Iterator<Item = String>) -> Format {
    let args: Vec<String> = args.collect();
    let separate = args.windows(2).any(|pair| pair == ["--output", "json"]);
    if separate || args.iter().any(|arg| arg == "--output=json") {
        Format::Json
    } else {
        Format::Human
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_line_is_answered_in_the_format_it_asks_for() {
        let args = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let format = |line| wanted_format(args(line).into_iter());
        assert_eq!(format("millpond --output json sned"), Format::Json);
        assert_eq!(format("millpond sned --output=json"), Format::Json);
        assert_eq!(format("millpond sned"), Format::Human);
    }
}
