//! From the common options to a connected client: where the CA is, which token to show.

use std::path::{Path, PathBuf};

use millpond_client::Client;

use crate::args::{DEFAULT_DATA, Global};
use crate::failure::Failure;

/// Connects as the options say.
pub async fn connect(global: &Global) -> Result<Client, Failure> {
    let mut builder = Client::builder()
        .ca_pem(read_ca(global)?)
        .name(format!("millpond-cli/{}", std::process::id()));
    if let Some(token) = &global.token {
        builder = builder.token(token.clone());
    }
    Ok(builder.connect(&global.server).await?)
}

fn read_ca(global: &Global) -> Result<Vec<u8>, Failure> {
    let path = ca_path(global.ca.as_deref(), global.data.as_deref());
    std::fs::read(&path).map_err(|error| {
        if global.ca.is_none() && error.kind() == std::io::ErrorKind::NotFound {
            Failure::NoCa(path)
        } else {
            Failure::Read { path, error }
        }
    })
}

fn ca_path(ca: Option<&Path>, data: Option<&Path>) -> PathBuf {
    match ca {
        Some(file) => file.to_owned(),
        None => data.unwrap_or(Path::new(DEFAULT_DATA)).join("tls/ca.pem"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ca_that_is_named_goes_before_the_data_folders() {
        let (ca, data) = (Path::new("a.pem"), Path::new("d"));
        assert_eq!(ca_path(Some(ca), Some(data)), ca);
        assert_eq!(ca_path(None, Some(data)), Path::new("d/tls/ca.pem"));
        assert_eq!(ca_path(None, None), Path::new("./millpond-data/tls/ca.pem"));
    }
}
