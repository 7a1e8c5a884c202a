use axum::http::Request;
use p256::ecdsa::signature::Signer as _;
use p256::ecdsa::{Signature, SigningKey};

use super::*;

struct Known {
    operators: Vec<(SecretHash, Operator)>,
    devices: Vec<DeviceId>,
}

impl Principals for Known {
    fn operator(&self, hash: SecretHash) -> BoxFuture<'_, Result<Option<Operator>, LookupError>> {
        let found = self.operators.iter().find(|(kept, _)| *kept == hash);
        Box::pin(async move { Ok(found.map(|(_, operator)| operator.clone())) })
    }

    fn device(&self, device: &DeviceId) -> Option<Arc<Place>> {
        self.devices.contains(device).then(|| Arc::new(Place::for_tests()))
    }
}

fn device(name: &str) -> DeviceId {
    name.parse().unwrap()
}

fn auth() -> (Auth, Secret) {
    let token = new_operator_token();
    let operator = Operator { name: "ci".to_owned(), role: Role::Operator };
    let known = Known { operators: vec![(token.hash(), operator)], devices: vec![device("dev-1")] };
    (Auth::new(HubSecret::generate(), Arc::new(known)), token)
}

fn parts(authorization: Option<&str>) -> Parts {
    let mut request = Request::builder().uri("/");
    if let Some(value) = authorization {
        request = request.header(header::AUTHORIZATION, value);
    }
    request.body(()).unwrap().into_parts().0
}

async fn call(auth: &Auth, authorization: &str) -> Result<Caller, AuthError> {
    auth.caller(&parts(Some(authorization))).await
}

#[tokio::test]
async fn operators_come_in_by_bearer_and_by_basic() {
    let (auth, token) = auth();
    let bearer = format!("Bearer {}", token.expose());
    let basic = format!("bASIC {}", STANDARD.encode(format!("any:{}", token.expose())));
    for header in [bearer, basic] {
        let caller = call(&auth, &header).await.unwrap();
        assert_eq!(caller.actor(), "token ci");
    }
    assert!(matches!(auth.caller(&parts(None)).await, Err(AuthError::Missing)));
    let long = format!("Bearer {}", "a".repeat(MAX_CREDENTIAL_BYTES + 1));
    for bad in ["Bearer", "Bearer ", "Digest x", "Basic !!", "Basic YWJj", &long] {
        assert!(matches!(call(&auth, bad).await, Err(AuthError::Malformed)), "{bad}");
    }
    for wrong in
        [format!("Bearer {}x", token.expose()), "Bearer slmt_".into(), "Bearer slmd_AAAA".into()]
    {
        assert!(matches!(call(&auth, &wrong).await, Err(AuthError::Invalid)), "{wrong}");
    }
}

#[test]
fn roles_are_ordered() {
    let operator = Operator { name: "ci".to_owned(), role: Role::Operator };
    assert!(operator.require(Role::Viewer).is_ok());
    assert!(operator.require(Role::Operator).is_ok());
    let error = operator.require(Role::Admin).unwrap_err();
    assert_eq!(error.status(), StatusCode::FORBIDDEN);
    assert!(error.problem().hint.unwrap().contains("admin"));
}

fn sign(key: &SigningKey, device: &DeviceId, challenge: &str) -> String {
    let text = format!("{TOKEN_CONTEXT}\n{device}\n{challenge}");
    let signature: Signature = key.sign(text.as_bytes());
    STANDARD.encode(signature.to_der())
}

#[tokio::test]
async fn a_device_signs_a_challenge_and_gets_a_token() {
    let (auth, _) = auth();
    let key = SigningKey::from_slice(&[7; 32]).unwrap();
    let pem = key.verifying_key().to_public_key_pem(LineEnding::CRLF).unwrap();
    let public = DeviceKey::from_pem(&pem).unwrap();
    assert_eq!(DeviceKey::from_pem(&public.to_pem()).unwrap(), public);

    let id = device("dev-1");
    let challenge = auth.challenge(&id).challenge;
    let signature = sign(&key, &id, &challenge);
    let request = DeviceTokenRequest { device: id.clone(), challenge, signature };
    let token = auth.device_token(Peer::default(), &request, &public).unwrap();
    let caller = call(&auth, &format!("Bearer {}", token.token)).await.unwrap();
    assert!(matches!(caller, Caller::Device(device) if device.id == id));

    // Signed by another key, for another device, with another challenge, or damaged.
    let other_key = SigningKey::from_slice(&[8; 32]).unwrap();
    let forged = sign(&other_key, &id, &request.challenge);
    let check = |request: DeviceTokenRequest| {
        auth.device_token(Peer::default(), &request, &public).map(|_| ()).unwrap_err()
    };
    let error = check(DeviceTokenRequest { signature: forged, ..request.clone() });
    assert!(matches!(error, AuthError::Signature { .. }), "{error}");
    let error = check(DeviceTokenRequest { signature: "AAAA".into(), ..request.clone() });
    assert!(matches!(error, AuthError::Signature { .. }), "{error}");
    let error = check(DeviceTokenRequest { device: device("dev-2"), ..request.clone() });
    assert!(matches!(error, AuthError::Challenge), "{error}");
    for bad in ["", "AAAA", "!", &"A".repeat(4000)] {
        let error = check(DeviceTokenRequest { challenge: bad.into(), ..request.clone() });
        assert!(matches!(error, AuthError::Challenge), "{error}");
    }
    let late = Timestamp::now() + CHALLENGE_VALID + SignedDuration::from_secs(1);
    let error = auth.check_device_request(&request, &public, late).map(|_| ()).unwrap_err();
    assert!(matches!(error, AuthError::Challenge), "{error}");
}

#[tokio::test]
async fn device_tokens_expire_cannot_be_changed_and_end_with_the_device() {
    let (auth, _) = auth();
    let secret = &auth.inner.secret;
    let now = Timestamp::now();
    let id = device("dev-1");
    let token = secret.device_token(&id, now);
    assert_eq!(secret.check_device_token(&token, now), Some(id.clone()));
    assert_eq!(secret.check_device_token(&token, now + DEVICE_TOKEN_VALID), None);
    let mut bytes =
        URL_SAFE_NO_PAD.decode(token.strip_prefix(DEVICE_TOKEN_PREFIX).unwrap()).unwrap();
    for index in 0..bytes.len() {
        bytes[index] ^= 1;
        let changed = format!("{DEVICE_TOKEN_PREFIX}{}", URL_SAFE_NO_PAD.encode(&bytes));
        assert_eq!(secret.check_device_token(&changed, now), None, "byte {index}");
        bytes[index] ^= 1;
    }
    assert_eq!(HubSecret::generate().check_device_token(&token, now), None);
    // A challenge is not a token, although both come from one key.
    let challenge = format!("{DEVICE_TOKEN_PREFIX}{}", secret.challenge(&id, now));
    assert_eq!(secret.check_device_token(&challenge, now), None);

    let revoked = secret.device_token(&device("dev-9"), now);
    assert!(matches!(call(&auth, &format!("Bearer {revoked}")).await, Err(AuthError::Invalid)));
}

#[tokio::test]
async fn guessing_is_slowed_without_locking_out_the_right_token() {
    let (auth, token) = auth();
    let good = format!("Bearer {}", token.expose());
    call(&auth, &good).await.unwrap();
    for _ in 0..MAX_FAILURES {
        assert!(matches!(call(&auth, "Bearer wrong").await, Err(AuthError::Invalid)));
    }
    let error = call(&auth, "Bearer wrong").await.unwrap_err();
    assert!(matches!(error, AuthError::TooMany { retry_after_s: 1..=60 }), "{error}");
    let response = error.into_response();
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(response.headers().contains_key(header::RETRY_AFTER));
    call(&auth, &good).await.expect("a token known as good still works");
    let elsewhere = Peer(Some("10.0.0.9".parse().unwrap()));
    auth.check_rate(elsewhere).expect("another address is not held back");
    let later = Instant::now() + FAILURE_WINDOW;
    assert_eq!(auth.inner.failures.wait(Peer::default(), later), None);
}

#[test]
fn counting_failures_is_bounded() {
    let failures = Failures::default();
    let now = Instant::now();
    for n in 0..(MAX_ADDRESSES as u32 + 500) {
        failures.record(Peer(Some(IpAddr::V4(n.into()))), now);
    }
    assert!(failures.counts.lock().unwrap().len() <= MAX_ADDRESSES + 1);
    let beyond = Peer(Some(IpAddr::V4(u32::MAX.into())));
    assert!(failures.wait(beyond, now).is_some(), "addresses beyond the table share one count");
    failures.record(beyond, now + FAILURE_WINDOW);
    assert_eq!(failures.wait(beyond, now + FAILURE_WINDOW), None);
}

#[test]
fn invitations_round_trip_and_bad_ones_are_refused() {
    let secret = new_invitation_secret();
    let invitation = InvitationText {
        url: "https://hub:8443".to_owned(),
        ca: slmops_artifact::Digest::of(b"ca"),
        id: "inv-1".parse().unwrap(),
        secret: secret.expose().to_owned(),
    };
    let text = encode_invitation(&invitation);
    assert!(decode_invitation(&format!(" {}\n", text.expose())).unwrap() == invitation);
    assert!(secret_matches(&invitation.secret, &secret.hash()));
    assert!(!secret_matches("0000", &secret.hash()));
    let long = format!("{INVITATION_PREFIX}{}", "A".repeat(MAX_INVITATION_BYTES));
    for bad in ["", "slmi1.", "slmi1.AAAA", "slmi2.e30", "slmi1.e30", &long] {
        assert!(matches!(decode_invitation(bad), Err(AuthError::Invitation)), "{bad}");
    }
}

#[test]
fn bad_keys_are_refused() {
    let long = "A".repeat(MAX_KEY_BYTES + 1);
    let empty = "-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n";
    for bad in ["", "junk", empty, &long] {
        assert!(matches!(DeviceKey::from_pem(bad), Err(AuthError::DeviceKey)), "{bad}");
    }
}

#[test]
fn the_hub_secret_is_kept_and_damage_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("secret");
    let first = HubSecret::load_or_create(&path).unwrap();
    assert_eq!(HubSecret::load_or_create(&path).unwrap().0, first.0);
    std::fs::write(&path, b"short").unwrap();
    let error = HubSecret::load_or_create(&path).unwrap_err();
    assert!(error.to_string().contains("hint:"), "{error}");
}

#[test]
fn debug_shows_no_secret() {
    let (auth, token) = auth();
    let hash = token.hash();
    assert_eq!(hash.to_string().parse::<SecretHash>().unwrap(), hash);
    let shown = format!("{token:?} {hash:?} {:?} {auth:?}", auth.inner.secret);
    assert_eq!(shown, "Secret(…) SecretHash(…) HubSecret(…) Auth(…)");
}
