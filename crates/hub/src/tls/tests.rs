use std::os::unix::fs::PermissionsExt as _;

use rustls::{ClientConnection, ServerConnection};

use super::*;

fn open(folder: &Path) -> Tls {
    Tls::open(folder, &["hub.example.com".to_owned(), "10.1.2.3".to_owned()]).unwrap()
}

/// Runs a handshake in memory; the digest of the last certificate the server sent.
fn handshake(tls: &Tls, ca_pem: &str, name: &str) -> Result<Digest, rustls::Error> {
    let config = Arc::new(client_config(ca_pem).unwrap());
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client = ClientConnection::new(config, name).unwrap();
    let mut server = ServerConnection::new(tls.server_config().unwrap()).unwrap();
    while client.is_handshaking() || server.is_handshaking() {
        let mut wire = Vec::new();
        client.write_tls(&mut wire).unwrap();
        server.read_tls(&mut wire.as_slice()).unwrap();
        server.process_new_packets()?;
        let mut wire = Vec::new();
        server.write_tls(&mut wire).unwrap();
        let mut left = wire.as_slice();
        while !left.is_empty() {
            client.read_tls(&mut left).unwrap();
        }
        client.process_new_packets()?;
    }
    Ok(Digest::of(client.peer_certificates().unwrap().last().unwrap()))
}

#[test]
fn clients_that_trust_the_authority_connect_by_every_name() {
    let folder = tempfile::tempdir().unwrap();
    let tls = open(folder.path());
    for name in ["localhost", "127.0.0.1", "::1", "hub.example.com", "10.1.2.3"] {
        let seen = handshake(&tls, tls.ca_pem(), name);
        assert_eq!(seen, Ok(tls.ca_digest()), "{name}");
    }
    assert!(handshake(&tls, tls.ca_pem(), "other.example.com").is_err());
}

#[test]
fn another_authority_is_refused() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (one, two) = (open(one.path()), open(two.path()));
    assert_ne!(one.ca_digest(), two.ca_digest());
    assert!(handshake(&one, two.ca_pem(), "localhost").is_err());
}

#[test]
fn the_authority_stays_and_its_key_is_private() {
    let folder = tempfile::tempdir().unwrap();
    let first = open(folder.path());
    let key = folder.path().join(CA_KEY_FILE);
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&key), 0o600);
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let second = open(folder.path());
    assert_eq!(mode(&key), 0o600);
    assert_eq!(first.ca_digest(), second.ca_digest());
    assert!(handshake(&second, first.ca_pem(), "localhost").is_ok());
    assert!(!format!("{first:?}").contains("PRIVATE"));
}

#[test]
fn lost_mixed_and_damaged_files_are_refused_with_a_hint() {
    let folder = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    open(folder.path());
    open(other.path());
    let key = folder.path().join(CA_KEY_FILE);
    let certificate = folder.path().join(CA_CERTIFICATE_FILE);
    let refused = || {
        let error = Tls::open(folder.path(), &[]).expect_err("refused");
        assert!(error.to_string().contains("hint:"), "{error}");
        error
    };

    let good = std::fs::read(&key).unwrap();
    std::fs::copy(other.path().join(CA_KEY_FILE), &key).unwrap();
    assert!(matches!(refused(), TlsError::Unusable { .. }));
    std::fs::write(&key, b"-----BEGIN nothing").unwrap();
    assert!(matches!(refused(), TlsError::Unusable { .. }));
    std::fs::remove_file(&key).unwrap();
    assert!(matches!(refused(), TlsError::KeyLost { .. }));
    std::fs::write(&key, &good).unwrap();
    std::fs::write(&certificate, b"\xff\xfe").unwrap();
    assert!(matches!(refused(), TlsError::Unusable { .. }));
    // A crash between key and certificate on first start: only the certificate is made anew.
    std::fs::remove_file(&certificate).unwrap();
    open(folder.path());
    assert_eq!(std::fs::read(&key).unwrap(), good);
}

#[test]
fn certificates_are_renewed_daily_and_valid_for_wrong_clocks() {
    let folder = tempfile::tempdir().unwrap();
    let tls = open(folder.path());
    let now = now();
    let first = tls.resolver.certificate(now);
    assert!(Arc::ptr_eq(&first, &tls.resolver.certificate(now + SignedDuration::from_hours(23))));
    let later = now + SignedDuration::from_hours(25);
    let second = tls.resolver.certificate(later);
    assert!(!Arc::ptr_eq(&first, &second));
    let year_2020: Timestamp = "2020-01-02T00:00:00Z".parse().unwrap();
    for at in [year_2020, now, later, later + SignedDuration::from_hours(88 * 24)] {
        assert_eq!(tls.authority.verify(&second, at), Ok(()), "{at}");
    }
    assert!(tls.authority.verify(&second, later + SignedDuration::from_hours(92 * 24)).is_err());
}

#[test]
fn bad_names_and_bad_client_certificates_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let error = Tls::open(folder.path(), &["not a name".to_owned()]).expect_err("refused");
    assert!(matches!(error, TlsError::Name { .. }));
    for bad in ["", "junk", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        assert!(matches!(client_config(bad), Err(TlsError::ClientCa { .. })), "{bad}");
    }
}
