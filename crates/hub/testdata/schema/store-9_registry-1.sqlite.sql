PRAGMA foreign_keys = OFF;
BEGIN;
CREATE TABLE schema_version (
                 component TEXT PRIMARY KEY,
                 version INTEGER NOT NULL
             ) STRICT;
CREATE TABLE devices (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        public_key TEXT NOT NULL UNIQUE,
        site TEXT,
        labels TEXT NOT NULL,
        facts TEXT NOT NULL,
        desired TEXT NOT NULL,
        report TEXT,
        report_sequence INTEGER NOT NULL DEFAULT 0,
        enrolled_at TEXT NOT NULL,
        last_seen TEXT NOT NULL,
        revoked INTEGER NOT NULL DEFAULT 0
    , orders TEXT) STRICT;
CREATE TABLE device_events (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        device TEXT NOT NULL REFERENCES devices (id),
        at TEXT NOT NULL,
        generation INTEGER NOT NULL,
        what TEXT NOT NULL
    ) STRICT;
CREATE INDEX device_events_by_device ON device_events (device, sequence);
CREATE TABLE invitations (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        secret TEXT NOT NULL,
        info TEXT NOT NULL,
        used_by TEXT REFERENCES devices (id)
    ) STRICT;
CREATE TABLE classes (name TEXT PRIMARY KEY, class TEXT NOT NULL) STRICT;
CREATE TABLE blueprints (
        layer TEXT NOT NULL, name TEXT NOT NULL, toml TEXT NOT NULL, PRIMARY KEY (layer, name)
    ) STRICT;
CREATE TABLE releases (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        model TEXT NOT NULL,
        version TEXT NOT NULL,
        release TEXT NOT NULL,
        UNIQUE (model, version)
    ) STRICT;
CREATE TABLE rollouts (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        state TEXT NOT NULL,
        final INTEGER NOT NULL,
        completed_sequence INTEGER,
        rollout TEXT NOT NULL
    , decisions INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE INDEX rollouts_active ON rollouts (final, sequence);
CREATE TABLE quarantine (
        manifest TEXT NOT NULL, class TEXT NOT NULL, since TEXT, rollout TEXT, PRIMARY KEY (manifest, class)
    ) STRICT;
CREATE TABLE tokens (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        hash TEXT NOT NULL UNIQUE,
        token TEXT NOT NULL
    ) STRICT;
CREATE TABLE publisher_keys (id TEXT PRIMARY KEY, key TEXT NOT NULL) STRICT;
CREATE TABLE audit (
        sequence INTEGER PRIMARY KEY,
        at TEXT NOT NULL,
        actor TEXT NOT NULL,
        action TEXT NOT NULL,
        object TEXT NOT NULL,
        details TEXT NOT NULL,
        previous TEXT NOT NULL,
        hash TEXT NOT NULL
    ) STRICT;
CREATE TABLE channels (name TEXT PRIMARY KEY, channel TEXT NOT NULL) STRICT;
CREATE TABLE webhooks (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        webhook TEXT NOT NULL,
        secret TEXT NOT NULL,
        cursor INTEGER NOT NULL
    , previous_secret TEXT, previous_until TEXT) STRICT;
CREATE TABLE webhook_deliveries (
        webhook TEXT NOT NULL,
        sequence INTEGER NOT NULL,
        action TEXT NOT NULL,
        state TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        next_ms INTEGER NOT NULL,
        last TEXT NOT NULL,
        PRIMARY KEY (webhook, sequence)
    ) STRICT;
CREATE INDEX webhook_deliveries_by_state ON webhook_deliveries (webhook, state, sequence);
CREATE TABLE rollout_devices (
        rollout TEXT NOT NULL,
        device TEXT NOT NULL,
        wave INTEGER NOT NULL,
        position INTEGER NOT NULL,
        failed INTEGER NOT NULL,
        part TEXT NOT NULL,
        before TEXT,
        PRIMARY KEY (rollout, device)
    ) STRICT, WITHOUT ROWID;
CREATE INDEX rollout_devices_in_order ON rollout_devices (rollout, wave, position, device);
CREATE INDEX rollout_devices_failed ON rollout_devices (rollout, wave, position, device)
        WHERE failed = 1;
CREATE TABLE planning (id INTEGER PRIMARY KEY, revision INTEGER NOT NULL) STRICT;
CREATE TABLE telemetry (
        span_s INTEGER NOT NULL,
        start_s INTEGER NOT NULL,
        model TEXT NOT NULL,
        version TEXT NOT NULL,
        class TEXT NOT NULL,
        site TEXT NOT NULL,
        counts TEXT NOT NULL,
        PRIMARY KEY (span_s, start_s, model, version, class, site)
    ) STRICT, WITHOUT ROWID;
CREATE TABLE audit_checkpoint (
        id INTEGER PRIMARY KEY,
        sequence INTEGER NOT NULL,
        hash TEXT NOT NULL,
        at TEXT NOT NULL
    ) STRICT;
CREATE TABLE deltas (
        model TEXT NOT NULL,
        from_weights TEXT NOT NULL,
        to_weights TEXT NOT NULL,
        manifest TEXT NOT NULL,
        devices INTEGER NOT NULL,
        state TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        wanted_ms INTEGER NOT NULL,
        leased_until_ms INTEGER NOT NULL,
        delta TEXT,
        why TEXT NOT NULL,
        PRIMARY KEY (model, from_weights, to_weights)
    ) STRICT;
CREATE INDEX deltas_by_state ON deltas (state, devices);
CREATE TABLE registry_repositories (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE
    ) STRICT;
CREATE TABLE registry_blobs (
        repository INTEGER NOT NULL REFERENCES registry_repositories (id),
        digest TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        PRIMARY KEY (repository, digest)
    ) STRICT, WITHOUT ROWID;
CREATE INDEX registry_blobs_by_digest ON registry_blobs (digest);
CREATE TABLE registry_manifests (
        repository INTEGER NOT NULL REFERENCES registry_repositories (id),
        digest TEXT NOT NULL,
        media_type TEXT NOT NULL,
        artifact_type TEXT,
        subject TEXT,
        annotations TEXT,
        content BLOB NOT NULL,
        pushed_at TEXT NOT NULL,
        PRIMARY KEY (repository, digest)
    ) STRICT;
CREATE INDEX registry_manifests_by_subject
        ON registry_manifests (repository, subject, digest) WHERE subject IS NOT NULL;
CREATE TABLE registry_references (
        repository INTEGER NOT NULL,
        manifest TEXT NOT NULL,
        target TEXT NOT NULL,
        PRIMARY KEY (repository, manifest, target),
        FOREIGN KEY (repository, manifest)
            REFERENCES registry_manifests (repository, digest) ON DELETE CASCADE
    ) STRICT, WITHOUT ROWID;
CREATE INDEX registry_references_by_target ON registry_references (repository, target);
CREATE TABLE registry_tags (
        repository INTEGER NOT NULL,
        name TEXT NOT NULL,
        manifest TEXT NOT NULL,
        PRIMARY KEY (repository, name),
        FOREIGN KEY (repository, manifest)
            REFERENCES registry_manifests (repository, digest) ON DELETE CASCADE
    ) STRICT, WITHOUT ROWID;
CREATE INDEX registry_tags_by_manifest ON registry_tags (repository, manifest);
CREATE TABLE registry_uploads (
        id TEXT PRIMARY KEY,
        repository INTEGER NOT NULL REFERENCES registry_repositories (id),
        started_at_s INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
INSERT INTO schema_version VALUES ('store',9);
INSERT INTO schema_version VALUES ('registry',1);
INSERT INTO devices VALUES ('d1','kitchen-pi','key of d1','berlin','{"room":"kitchen"}','{"hostname":"Kitchen Pi","arch":"aarch64","kernel":"Linux 6.1","cpu":"test","cpu_features":[],"cores":4,"memory_bytes":1073741824,"memory_budget_bytes":536870912,"disk_free_bytes":1073741824,"agent_version":"0.1.0","engine":"test"}','{"generation":2,"model":{"model":"m","version":"1.0.0","variant":"q4_k_m","manifest":"sha256:d863b65747fd524e55ac57805152e4e46a58caeb99c01443d0dd89d93cc8acd5","weights":"sha256:78d8d603f68805aaed4f0f04b7411631251aa4d60bb9eaff7fefd6c4d70952a3","size_bytes":7,"predicted_memory_bytes":9},"runtime":{"context_tokens":2048,"parallel":2,"threads":0,"batch_tokens":512,"kv_type":"f16","flash_attention":true,"queue_limit":64},"confirm_timeout_s":60,"reason":"test"}','{"sequence":3,"generation":2,"phase":"confirmed","running":{"model":"m","version":"1.0.0","variant":"q4_k_m","manifest":"sha256:d863b65747fd524e55ac57805152e4e46a58caeb99c01443d0dd89d93cc8acd5","weights":"sha256:78d8d603f68805aaed4f0f04b7411631251aa4d60bb9eaff7fefd6c4d70952a3"},"rejected":[],"probes":[],"telemetry":{"requests":0,"errors":0,"prompt_tokens":0,"generated_tokens":0,"worker_crashes":0,"downloaded_bytes":0,"tokens_per_s":0.0,"time_to_first_token_ms":0.0,"worker_memory_bytes":0,"worker_peak_memory_bytes":0},"evidence":{"manifest":"sha256:d863b65747fd524e55ac57805152e4e46a58caeb99c01443d0dd89d93cc8acd5","serving_s":40.0,"answered":40,"errors":1,"crashes":0,"empty":0,"truncated":0,"repetitive":0,"refusals":0,"json":0,"invalid_json":0,"thumbs_up":0,"thumbs_down":0,"entropy_tokens":0,"entropy_nats":0.0,"first_tokens":40,"first_token_ln_ms":156.48092021712583,"decoded_tokens":800,"decode_ms":40000.0,"peak_memory_bytes":209715200},"facts":{"hostname":"Kitchen Pi","arch":"aarch64","kernel":"Linux 6.1","cpu":"test","cpu_features":[],"cores":4,"memory_bytes":1073741824,"memory_budget_bytes":536870912,"disk_free_bytes":1073741824,"agent_version":"0.1.0","engine":"test"}}',3,'2027-01-15T08:00:10Z','2027-01-15T08:00:30Z',0,'{"exclusion":{"reason":"it''s away","by":"token test","at":"2027-01-15T08:00:00Z"}}');
INSERT INTO devices VALUES ('d2','kitchen-pi-2','key of d2','berlin','{"room":"kitchen"}','{"hostname":"Kitchen Pi","arch":"aarch64","kernel":"Linux 6.1","cpu":"test","cpu_features":[],"cores":4,"memory_bytes":1073741824,"memory_budget_bytes":536870912,"disk_free_bytes":1073741824,"agent_version":"0.1.0","engine":"test"}','{"generation":1,"runtime":{"context_tokens":2048,"parallel":2,"threads":0,"batch_tokens":512,"kv_type":"f16","flash_attention":true,"queue_limit":64},"confirm_timeout_s":900,"reason":"no release is meant for this device yet"}',NULL,0,'2027-01-15T08:00:10Z','2027-01-15T08:00:10Z',1,NULL);
INSERT INTO device_events VALUES (1,'d1','2027-01-15T08:00:10Z',1,'joined by invitation i-d1');
INSERT INTO device_events VALUES (2,'d2','2027-01-15T08:00:10Z',1,'joined by invitation i-d2');
INSERT INTO device_events VALUES (3,'d1','2027-01-15T08:00:30Z',2,'confirmed: runs m 1.0.0 (q4_k_m)');
INSERT INTO device_events VALUES (4,'d2','2027-01-15T08:00:00Z',1,'shut out of the fleet');
INSERT INTO device_events VALUES (5,'d1','2027-01-15T08:00:00Z',1,'excluded by token test: it''s away');
INSERT INTO device_events VALUES (6,'d1','2027-01-15T08:00:00Z',2,'told to be m 1.0.0 (q4_k_m): test');
INSERT INTO sqlite_sequence VALUES ('invitations',3);
INSERT INTO sqlite_sequence VALUES ('device_events',6);
INSERT INTO sqlite_sequence VALUES ('webhooks',1);
INSERT INTO sqlite_sequence VALUES ('releases',2);
INSERT INTO sqlite_sequence VALUES ('rollouts',2);
INSERT INTO sqlite_sequence VALUES ('tokens',1);
INSERT INTO invitations VALUES (1,'i-d1','bd66bb2a4f3112ba0e97d693718f7e9df270782b1af7d2fae4a8f59d77e051f6','{"id":"i-d1","labels":{"room":"kitchen"},"site":"berlin","created_at":"2027-01-15T08:00:00Z","expires_at":"2027-01-15T08:16:40Z"}','d1');
INSERT INTO invitations VALUES (2,'i-d2','b1cce1284648b717c9b302682dad30f3dec1bfb0cfa17e977b420b2a5f0446a4','{"id":"i-d2","labels":{"room":"kitchen"},"site":"berlin","created_at":"2027-01-15T08:00:00Z","expires_at":"2027-01-15T08:16:40Z"}','d2');
INSERT INTO invitations VALUES (3,'i-open','395661c1b34d183fb4049ae64e557ae089d48434c45bd181e2a23e67b1480b59','{"id":"i-open","labels":{"room":"kitchen"},"site":"berlin","created_at":"2027-01-15T08:00:00Z","expires_at":"2027-01-15T08:16:40Z"}',NULL);
INSERT INTO classes VALUES ('small','{"name":"small","description":"","min_memory_bytes":0,"quantisation":"Q4_K_M"}');
INSERT INTO blueprints VALUES ('device','d1','model = "m" # it''s quoted: \ 
');
INSERT INTO releases VALUES (1,'m','1.0.0','{"model":"m","version":"1.0.0","original":"sha256:0682c5f2076f099c34cfdd15a9e063849ed437a49677e6fcc5b4198c76575be5","key":"0123456789abcdef","variants":[{"name":"q4_k_m","classes":[],"quantisation":"Q4_K_M","manifest":"sha256:d863b65747fd524e55ac57805152e4e46a58caeb99c01443d0dd89d93cc8acd5","weights":"sha256:78d8d603f68805aaed4f0f04b7411631251aa4d60bb9eaff7fefd6c4d70952a3","size_bytes":7,"repacked_bytes":0,"shape":{"architecture":"llama","parameters":1,"layers":1,"embedding":1,"feed_forward":1,"heads":1,"kv_heads":1,"key_width":1,"value_width":1,"vocabulary":1,"trained_context":128},"report":{"version":1,"subject":"sha256:78d8d603f68805aaed4f0f04b7411631251aa4d60bb9eaff7fefd6c4d70952a3","reference":"sha256:0682c5f2076f099c34cfdd15a9e063849ed437a49677e6fcc5b4198c76575be5","suite":"sha256:f8ebd43dbef1f029bf4930c65c9b7c5cc76af476927cee861ff18fcc73bfc4ab","size_bytes":7,"perplexity":20.1234567890123,"kl_divergence":{"mean":0.1,"low":0.05,"high":0.2,"samples":9},"kl_p99":0.3,"top1_agreement":{"mean":0.1,"low":0.05,"high":0.2,"samples":9},"tasks":[],"decode_tokens_per_s":0.3333333333333333,"prompt_tokens_per_s":0.6666666666666666,"time_to_first_token_ms":0.30000000000000004,"peak_memory_bytes":1,"machine":{"cpu":"test","arch":"x86_64","cores":1,"memory_bytes":1,"kernel":"test","measured":"real"},"engine":"test","finished_at":"2027-01-15T08:00:00Z","chunk_nll":[2.345678901234567,1e-17],"chunk_kl":[]}}],"created_at":"2027-01-15T08:00:00Z","created_by":"token test"}');
INSERT INTO releases VALUES (2,'m','1.1.0','{"model":"m","version":"1.1.0","original":"sha256:0682c5f2076f099c34cfdd15a9e063849ed437a49677e6fcc5b4198c76575be5","key":"0123456789abcdef","variants":[{"name":"q4_k_m","classes":[],"quantisation":"Q4_K_M","manifest":"sha256:343efffcf3daa5fbaf4fa40310b6b2fed48ee002ba0474f14e3cb5fed207d490","weights":"sha256:d972240b2a6544baa90533fff913e9ef01b3a1fb7259fb6302a2a6736806ef74","size_bytes":7,"repacked_bytes":0,"shape":{"architecture":"llama","parameters":1,"layers":1,"embedding":1,"feed_forward":1,"heads":1,"kv_heads":1,"key_width":1,"value_width":1,"vocabulary":1,"trained_context":128},"report":{"version":1,"subject":"sha256:d972240b2a6544baa90533fff913e9ef01b3a1fb7259fb6302a2a6736806ef74","reference":"sha256:0682c5f2076f099c34cfdd15a9e063849ed437a49677e6fcc5b4198c76575be5","suite":"sha256:f8ebd43dbef1f029bf4930c65c9b7c5cc76af476927cee861ff18fcc73bfc4ab","size_bytes":7,"perplexity":20.1234567890123,"kl_divergence":{"mean":0.1,"low":0.05,"high":0.2,"samples":9},"kl_p99":0.3,"top1_agreement":{"mean":0.1,"low":0.05,"high":0.2,"samples":9},"tasks":[],"decode_tokens_per_s":0.3333333333333333,"prompt_tokens_per_s":0.6666666666666666,"time_to_first_token_ms":0.30000000000000004,"peak_memory_bytes":1,"machine":{"cpu":"test","arch":"x86_64","cores":1,"memory_bytes":1,"kernel":"test","measured":"real"},"engine":"test","finished_at":"2027-01-15T08:00:00Z","chunk_nll":[2.345678901234567,1e-17],"chunk_kl":[]}}],"created_at":"2027-01-15T08:00:00Z","created_by":"token test"}');
INSERT INTO rollouts VALUES (1,'r1','completed',1,1,'{"rollout":{"id":"r1","model":"m","version":"1.0.0","policy":{"selector":"all","waves":[{"count":1},"rest"],"per":"fleet","max_failures":0,"bake_s":0,"confirm_timeout_s":900,"schedule":{},"limits":{"metered":"allow"},"approvals":[],"stragglers":{"away_after_s":604800,"unheard":"fail"}},"state":"completed","current_wave":0,"waves":1,"devices":[],"counts":[{"pending":0,"updating":0,"confirmed":0,"failed":0,"no_fit":0,"quarantined":0,"away":0,"recalled":0}],"decisions":[{"at":"2027-01-15T08:00:20Z","what":"created for m 1.0.0, 1 wave","because":["selector all means 0 devices; 0 can get it"]}],"waiting_for":"the first wave to start","created_at":"2027-01-15T08:00:20Z","created_by":"token test","updated_at":"2027-01-15T08:00:20Z"},"before":{},"forgiven":[]}',1);
INSERT INTO rollouts VALUES (2,'r2','running',0,NULL,'{"rollout":{"id":"r2","model":"m","version":"1.1.0","policy":{"selector":"all","waves":[{"count":1},"rest"],"per":"fleet","max_failures":0,"bake_s":0,"confirm_timeout_s":900,"schedule":{},"limits":{"metered":"allow"},"approvals":[],"stragglers":{"away_after_s":604800,"unheard":"fail"}},"state":"running","current_wave":0,"waves":1,"devices":[],"counts":[{"pending":0,"updating":0,"confirmed":0,"failed":0,"no_fit":0,"quarantined":0,"away":0,"recalled":0}],"decisions":[{"at":"2027-01-15T08:00:20Z","what":"created for m 1.1.0, 1 wave","because":["selector all means 0 devices; 0 can get it"]}],"waiting_for":"the first wave to start","created_at":"2027-01-15T08:00:20Z","created_by":"token test","updated_at":"2027-01-15T08:00:20Z"},"before":{},"forgiven":[]}',1);
INSERT INTO quarantine VALUES ('sha256:2f05d4b689d270cafb02285f35f44866f7dc8a2d368a3f9d1124373eeab31fb1','small','2027-01-15T08:00:00Z',NULL);
INSERT INTO tokens VALUES (1,'t1','628b49d96dcde97a430dd4f597705899e09a968f793491e4b704cae33a40dc02','{"id":"t1","name":"first","role":"admin","created_at":"2027-01-15T08:00:00Z"}');
INSERT INTO publisher_keys VALUES ('0123456789abcdef','{"id":"0123456789abcdef","name":"ci","public_key":"pem"}');
INSERT INTO audit VALUES (1,'2027-01-15T08:00:00Z','token test','invitation.create','i-d1','{"labels":{"room":"kitchen"},"site":"berlin","expires_at":"2027-01-15T08:16:40Z"}','sha256:0000000000000000000000000000000000000000000000000000000000000000','sha256:f8cc845ca2ef1d5933f26e1bd6cefb756edadca7da6f60ddec58cb0033ee76bb');
INSERT INTO audit VALUES (2,'2027-01-15T08:00:10Z','device d1','device.enrol','d1','{"name":"kitchen-pi","invitation":"i-d1"}','sha256:f8cc845ca2ef1d5933f26e1bd6cefb756edadca7da6f60ddec58cb0033ee76bb','sha256:b2b62ffe5f4c308c31ded8c2e69fafc69cbfc2a83532cfeb2d5432fc5fd798db');
INSERT INTO audit VALUES (3,'2027-01-15T08:00:00Z','token test','invitation.create','i-d2','{"labels":{"room":"kitchen"},"site":"berlin","expires_at":"2027-01-15T08:16:40Z"}','sha256:b2b62ffe5f4c308c31ded8c2e69fafc69cbfc2a83532cfeb2d5432fc5fd798db','sha256:34ab5477583be3cd2f975e2f8c1912b64f51052eea06aafd10a5ee7d6da2ffff');
INSERT INTO audit VALUES (4,'2027-01-15T08:00:10Z','device d2','device.enrol','d2','{"name":"kitchen-pi-2","invitation":"i-d2"}','sha256:34ab5477583be3cd2f975e2f8c1912b64f51052eea06aafd10a5ee7d6da2ffff','sha256:1d2990b894bc1b49d166a1a5ee864b5bcaabc4ee0c3c2925092ac3e64f07f0a1');
INSERT INTO audit VALUES (5,'2027-01-15T08:00:00Z','token test','invitation.create','i-open','{"labels":{"room":"kitchen"},"site":"berlin","expires_at":"2027-01-15T08:16:40Z"}','sha256:1d2990b894bc1b49d166a1a5ee864b5bcaabc4ee0c3c2925092ac3e64f07f0a1','sha256:50f9503e27c7351170ee10be920f5034ccae52a60142281ab1f0bada3ba8bb34');
INSERT INTO audit VALUES (6,'2027-01-15T08:00:00Z','token test','device.revoke','d2','{"name":"kitchen-pi-2"}','sha256:50f9503e27c7351170ee10be920f5034ccae52a60142281ab1f0bada3ba8bb34','sha256:2be2f81e029b6b02ad405071e62b9a3d7c793e49f68b34b9f16fec8da864d39b');
INSERT INTO audit VALUES (7,'2027-01-15T08:00:00Z','token test','device.exclude','d1','{"reason":"it''s away"}','sha256:2be2f81e029b6b02ad405071e62b9a3d7c793e49f68b34b9f16fec8da864d39b','sha256:0ec326a341d5a1dd69b04af86ecddd77d72543fb861abdbbd6ebc96b7dbdd1b3');
INSERT INTO audit VALUES (8,'2027-01-15T08:00:00Z','token test','class.put','small','{"min_memory_bytes":0,"quantisation":"Q4_K_M"}','sha256:0ec326a341d5a1dd69b04af86ecddd77d72543fb861abdbbd6ebc96b7dbdd1b3','sha256:2f708cd6a9aed6df09af2b7dc760c84ce49c1e623e19544abadd9d2aaaf222c5');
INSERT INTO audit VALUES (9,'2027-01-15T08:00:00Z','token test','channel.put','beta','{"after":null,"policy":{"selector":"all","waves":[{"count":1},"rest"],"per":"fleet","max_failures":0,"bake_s":0,"confirm_timeout_s":900,"schedule":{},"limits":{"metered":"allow"},"approvals":[],"stragglers":{"away_after_s":604800,"unheard":"fail"}}}','sha256:2f708cd6a9aed6df09af2b7dc760c84ce49c1e623e19544abadd9d2aaaf222c5','sha256:d3c1b3dc8df516121de04d2ca85b4124d0ed70debfe9719fef9a9a6bcaef353c');
INSERT INTO audit VALUES (10,'2027-01-15T08:00:00Z','token test','webhook.create','w1','{"host":"example.com","events":["class.*"]}','sha256:d3c1b3dc8df516121de04d2ca85b4124d0ed70debfe9719fef9a9a6bcaef353c','sha256:2807668fb7ea0b675a763f56b1949a34c7945c49e6657a16fcb547d9349967c8');
INSERT INTO audit VALUES (11,'2027-01-15T08:00:00Z','token test','webhook.test','w1','{}','sha256:2807668fb7ea0b675a763f56b1949a34c7945c49e6657a16fcb547d9349967c8','sha256:214e03c43ec921c5d7ca10ab6e583a3fde3121f85ffe31f8ea0a55c973346bcc');
INSERT INTO audit VALUES (12,'2027-01-15T08:00:00Z','token test','blueprint.put','device/d1','{"toml":"model = \"m\" # it''s quoted: \\ \n"}','sha256:214e03c43ec921c5d7ca10ab6e583a3fde3121f85ffe31f8ea0a55c973346bcc','sha256:4a33655eb3d4a6eee3b6bf2bac0858fb427422c4f296bc591029efc7f5969eb9');
INSERT INTO audit VALUES (13,'2027-01-15T08:00:00Z','token test','release.create','m 1.0.0','{"variants":["q4_k_m sha256:d863b65747fd524e55ac57805152e4e46a58caeb99c01443d0dd89d93cc8acd5"],"key":"0123456789abcdef"}','sha256:4a33655eb3d4a6eee3b6bf2bac0858fb427422c4f296bc591029efc7f5969eb9','sha256:471f30be0605e57184c4d56284959171c3eaf425b5c678867a6ddfcb91997b86');
INSERT INTO audit VALUES (14,'2027-01-15T08:00:00Z','token test','release.create','m 1.1.0','{"variants":["q4_k_m sha256:343efffcf3daa5fbaf4fa40310b6b2fed48ee002ba0474f14e3cb5fed207d490"],"key":"0123456789abcdef"}','sha256:471f30be0605e57184c4d56284959171c3eaf425b5c678867a6ddfcb91997b86','sha256:08a0c3b29c98aada805f6a9da7153c7a82d54ce3e5b625bbb4fd387296f8b42e');
INSERT INTO audit VALUES (15,'2027-01-15T08:00:00Z','hub','rollout.decide','r1','{"what":"created for m 1.0.0, 1 wave","because":["selector all means 0 devices; 0 can get it"],"state":"completed"}','sha256:08a0c3b29c98aada805f6a9da7153c7a82d54ce3e5b625bbb4fd387296f8b42e','sha256:08c53fe46b77f31aa822f97913660e9a6f85a60084a08574e91a6c3e8d7a0fb1');
INSERT INTO audit VALUES (16,'2027-01-15T08:00:00Z','hub','device.assign','d1','{"generation":2,"model":"m 1.0.0","variant":"q4_k_m","manifest":"sha256:d863b65747fd524e55ac57805152e4e46a58caeb99c01443d0dd89d93cc8acd5","reason":"test"}','sha256:08c53fe46b77f31aa822f97913660e9a6f85a60084a08574e91a6c3e8d7a0fb1','sha256:aba0e68d92dde3e3c6f78d599eaf64c29f47625ce2281e4e941c49611911611f');
INSERT INTO audit VALUES (17,'2027-01-15T08:00:00Z','hub','manifest.quarantine','sha256:2f05d4b689d270cafb02285f35f44866f7dc8a2d368a3f9d1124373eeab31fb1','{"class":"small","rollout":null}','sha256:aba0e68d92dde3e3c6f78d599eaf64c29f47625ce2281e4e941c49611911611f','sha256:a89cff82f7edbe7f9725d7d5cab28c4a53b834ce04e72f0e4438ba048918ecb9');
INSERT INTO audit VALUES (18,'2027-01-15T08:00:00Z','hub','rollout.decide','r2','{"what":"created for m 1.1.0, 1 wave","because":["selector all means 0 devices; 0 can get it"],"state":"running"}','sha256:a89cff82f7edbe7f9725d7d5cab28c4a53b834ce04e72f0e4438ba048918ecb9','sha256:6e87f3a1e8d38e8a86188fc9946b823ef45eb1434f562fc5458b3f59ba1a5e10');
INSERT INTO audit VALUES (19,'2027-01-15T08:00:00Z','token test','token.create','t1','{"name":"first","role":"admin","expires_at":null}','sha256:6e87f3a1e8d38e8a86188fc9946b823ef45eb1434f562fc5458b3f59ba1a5e10','sha256:3fca68976e39ac8ecbce6e50caa0152a9cfa5225c90aa857816a89344538b4db');
INSERT INTO audit VALUES (20,'2027-01-15T08:00:00Z','token test','key.add','0123456789abcdef','{"name":"ci"}','sha256:3fca68976e39ac8ecbce6e50caa0152a9cfa5225c90aa857816a89344538b4db','sha256:35cba8bdba7f57b4fa8b895053883451f973cc123450526437963a2f8f346126');
INSERT INTO channels VALUES ('beta','{"name":"beta","policy":{"selector":"all","waves":[{"count":1},"rest"],"per":"fleet","max_failures":0,"bake_s":0,"confirm_timeout_s":900,"schedule":{},"limits":{"metered":"allow"},"approvals":[],"stragglers":{"away_after_s":604800,"unheard":"fail"}}}');
INSERT INTO webhooks VALUES (1,'w1','{"asked":{"url":"https://example.com/hook?key=hidden","events":["class.*"],"retry":{"attempts":20,"first_delay_ms":5000,"max_delay_ms":3600000,"timeout_ms":10000}},"created_at":"2027-01-15T08:00:00Z","created_by":"token test"}','whsec_ScbdEdz0c0ahZosdqUbYVqv3mI54dabXnSWJiL7SwWo=',11,NULL,NULL);
INSERT INTO webhook_deliveries VALUES ('w1',11,'webhook.test','pending',0,1800000040000,'');
INSERT INTO planning VALUES (1,6);
INSERT INTO telemetry VALUES (3600,1800000000,'m','1.0.0','small','','{"reports":1,"answered":40,"errors":1,"crashes":0,"decoded_tokens":800,"tokens_per_s":{"34":40},"first_token_ms":{"45":40},"memory_bytes":{"221":1}}');
INSERT INTO deltas VALUES ('m','sha256:cba06b5736faf67e54b07b561eae94395e774c517a7d910a54369e1263ccfbd4','sha256:11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437','sha256:05b3abf2579a5eb66403cd78be557fd860633a1fe2103c7642030defe32c657f',3,'queued',0,1800000030000,0,NULL,'');
INSERT INTO registry_repositories VALUES (1,'models/m');
INSERT INTO registry_blobs VALUES (1,'sha256:9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c',7);
INSERT INTO registry_manifests VALUES (1,'sha256:28c37e865ae0fe66de1145571ff0ebe75a643ad19f483ecb56b4282be66547cc','a/b','c/d','sha256:a9491f4c1bf7b0cffbadcba2db8f028e4b3f2867cb59e1f3a0bc1968f3c51242','{}',X'7B202269742773223A20225C20FF000A22207D','now');
INSERT INTO registry_references VALUES (1,'sha256:28c37e865ae0fe66de1145571ff0ebe75a643ad19f483ecb56b4282be66547cc','sha256:9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c');
INSERT INTO registry_tags VALUES (1,'v1','sha256:28c37e865ae0fe66de1145571ff0ebe75a643ad19f483ecb56b4282be66547cc');
INSERT INTO registry_uploads VALUES ('up',1,1);
COMMIT;
